"""繁體中文：以模型撰寫、批次修改說明文字時的訊息；見 `zh_hant_sentences.py`。"""

CAPTIONS = {
    "{folder}: there is no change of captions to undo": "{folder}：沒有可復原的說明文字修改",
    "folder {folder} does not exist": "資料夾 {folder} 不存在",
    "{file} line {line}: damaged; no caption was changed": "{file} 第 {line} 行：已損壞；沒有更動任何說明文字",
    "{file}: cannot be written ({reason})": "{file}：無法寫入（{reason}）",
    "{folder}: captions cannot be written there ({reason})": "{folder}：無法寫入說明文字（{reason}）",
    "captioner {model}: {problem}": "說明模型 {model}：{problem}",
    "captioner {model} is a file: give the folder it is in: {folder}": (
        "說明模型 {model} 是檔案：請指定它所在的資料夾：{folder}"
    ),
    "captioner {model}: no such folder; give a folder, or a hub id such as owner/name": (
        "說明模型 {model}：沒有這個資料夾；請指定資料夾，或如 owner/name 的 hub 名稱"
    ),
    "captioner {model}: no captioner there; give a folder or hub id with config.json and .safetensors weights, or with "
    "a .onnx file and selected_tags.csv": (
        "說明模型 {model}：其中沒有說明模型；請指定含 config.json 與 .safetensors 權重，"
        "或含 .onnx 檔與 selected_tags.csv 的資料夾或 hub 名稱"
    ),
    "captioner {model}: {file} is not there; get the model again": "說明模型 {model}：缺少 {file}；請重新取得模型",
    "captioner {model} is not in the cache and HF_HUB_OFFLINE is set: unset it, or give a folder": (
        "說明模型 {model} 不在快取中，且設定了 HF_HUB_OFFLINE：請取消它，或指定資料夾"
    ),
    "captioner {model} is not on this machine: {size} MB would be fetched; allow it with --fetch": (
        "這台電腦上沒有說明模型 {model}：需要下載 {size} MB；請勾選允許下載（--fetch）"
    ),
    "captioner {model} needs onnxruntime; {hint}": "說明模型 {model} 需要 onnxruntime；{hint}",
    "captioner {model}: a tagger takes no --prompt; leave it out": "說明模型 {model}：標籤模型不接受問題；請留空",
    "captioner {model}: this model takes no --prompt; leave it out": "說明模型 {model}：這個模型不接受問題；請留空",
    "captioner {model}: needs more packages ({reason}); {hint}": ("說明模型 {model}：需要更多套件（{reason}）；{hint}"),
    "captioner {model}: cannot be loaded ({reason}); get the model again": (
        "說明模型 {model}：無法載入（{reason}）；請重新取得模型"
    ),
    "captioner {model}: {file} cannot be loaded ({reason}); get the model again": (
        "說明模型 {model}：無法載入 {file}（{reason}）；請重新取得模型"
    ),
    "captioner {model}: its weights lack {count} tensors, such as {name}; get the model again": (
        "說明模型 {model}：權重缺少 {count} 個張量，例如 {name}；請重新取得模型"
    ),
    "{photo}: no caption: {reason}": "{photo}：沒有說明文字：{reason}",
    "captions: the command ended with code {code}": "說明文字：指令結束，代碼 {code}",
    "the model says nothing of it": "模型沒有給出任何文字",
    "stopped; the same command goes on with the photos that have no caption yet": (
        "已停止；再按一次會從還沒有說明文字的照片繼續"
    ),
}
