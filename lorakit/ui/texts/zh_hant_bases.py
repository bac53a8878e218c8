"""繁體中文：關於基礎模型、分詞器與模型檔的話（families/*、core/safetensors_header.py）。見 `zh_hant_sentences.py`。"""

BASES = {
    "its UNet takes the guidance as an input: training gives it none, samples give it {guidance}": (
        "它的 UNet 把引導強度當作輸入：訓練時不給，樣張給 {guidance}"
    ),
    "base {name} is SDXL-Lightning's model for 1 step, as its name says, which predicts the picture (x0), as lorakit "
    "does not train: give the model for 2, 4 or 8 steps; if the name is wrong, set model.prediction_type": (
        "從名稱看，基礎模型 {name} 是 SDXL-Lightning 的 1 步模型，它預測圖片本身（x0），無法訓練："
        "請改用 2、4 或 8 步的模型；若名稱有誤，請設定 model.prediction_type"
    ),
    "the usual loss slowly undoes distillation: train on the model that it was made from, if you have it": (
        "一般的損失會慢慢抵消蒸餾：若有蒸餾前的模型，請在那上面訓練"
    ),
    "as its scheduler says": "依其排程器",
    "as its UNet says": "依其 UNet",
    "as its metadata says": "依檔案的中繼資料",
    "as its name says": "依其名稱",
    "base {path} does not exist: give a .safetensors file, a folder in diffusers layout or a hub id, owner/name": (
        "基礎模型 {path} 不存在：請指定 .safetensors 檔、diffusers 格式的資料夾，或 hub 識別名 owner/name"
    ),
    "base {path} does not exist; as a hub id it is {name}, and {name}@REVISION at another revision": (
        "基礎模型 {path} 不存在；作為 hub 識別名是 {name}，其他版本則是 {name}@REVISION"
    ),
    "{base}: {what} has {name} = {part}, but {width} channels are no multiple: get the base again": (
        "{base}：{what} 的 {name} = {part}，而 {width} 個通道不是它的倍數：請重新取得基礎模型"
    ),
    "base {link} is a link: give its path, {path}": "基礎模型 {link} 是連結：請指定它的路徑 {path}",
    "model.base is empty: name a base, or leave it out for the bundled one": (
        "model.base 是空的：請指定基礎模型，或省略它以使用內附的"
    ),
    "keys that are not of such a model, ignored: {keys}": "略過不屬於這種模型的鍵：{keys}",
    "{file} has {key}, a scale that belongs to no weight: get the file in fp16": (
        "{file} 有 {key}，這個縮放係數不屬於任何權重：請改用 fp16 的檔案"
    ),
    "base {path} was trained with {schedule}, which lorakit does not do: give another base": (
        "基礎模型 {path} 以 {schedule} 訓練，lorakit 不支援：請改用別的基礎模型"
    ),
    "{file} predicts {kind}, as its metadata says, which lorakit does not train": (
        "依檔案資訊，{file} 預測 {kind}，lorakit 不訓練這種模型"
    ),
    "base {path} predicts the flow: leave model.prediction_type": "基礎模型 {path} 預測 flow：請勿更改此項",
    "train.min_snr_gamma is not defined for base {name}, which predicts the flow: leave it unset": (
        "基礎模型 {name} 預測 flow，train.min_snr_gamma 對它沒有定義：請不要設定"
    ),
    "adapter.new_tokens: base {name} reads texts by {encoder} too, which learns no words; set it to 0": (
        "adapter.new_tokens：基礎模型 {name} 也用 {encoder} 讀文字，而它不學新詞；請設為 0"
    ),
    "base {path} has no T5: leave model.t5": "基礎模型 {path} 沒有 T5：請勿更改 model.t5",
    "base {file} has T5 and no tokenizer for it on this machine, and HF_HUB_OFFLINE is set: {ways}": (
        "基礎模型 {file} 有 T5，這台電腦上卻沒有它的分詞器，且已設定 HF_HUB_OFFLINE：請把 model.tokenizer "
        "設為含 tokenizer_3/tokenizer.json 的資料夾或 ComfyUI 的資料夾；或設 model.t5 = false，不使用 T5"
    ),
    "base {file} has a T5 of {rows} words where the published have {count}: {ways}": (
        "基礎模型 {file} 的 T5 有 {rows} 個詞，公開的 T5 有 {count} 個：請把 model.tokenizer 設為它自己的分詞器，"
        "或設 model.t5 = false"
    ),
    "tokenizer {folder} is not T5's: {ways}": (
        "分詞器 {folder} 不是 T5 的：請把 model.tokenizer 設為含 tokenizer_3/tokenizer.json 的資料夾，"
        "或設 model.t5 = false"
    ),
    "base {file} has its own text encoders: leave model.text_encoders": (
        "基礎模型 {file} 自有文字編碼器：請不要設定 model.text_encoders"
    ),
    "model.text_encoders: {place} has no text encoders that fit base {file}: {way}": (
        "model.text_encoders：{place} 沒有適合基礎模型 {file} 的文字編碼器：請設為有 clip_l.safetensors 與 "
        "clip_g.safetensors 的資料夾，或有它們的基礎模型（diffusers 格式的資料夾或 hub 識別名）"
    ),
    "base {file} has no text encoders in it, and none are beside it: {way}": (
        "基礎模型 {file} 內沒有文字編碼器，檔案旁也沒有：請把 model.text_encoders 設為有 clip_l.safetensors 與 "
        "clip_g.safetensors 的資料夾，或有它們的基礎模型（diffusers 格式的資料夾或 hub 識別名）"
    ),
    "base {path} lacks {parts}: get the base again": "基礎模型 {path} 缺少 {parts}：請重新取得",
    "base {file} has no tokenizer with it, and HF_HUB_OFFLINE is set: {ways}": (
        "基礎模型 {file} 沒有附分詞器，而且設了 HF_HUB_OFFLINE：請把 model.tokenizer 設為有 vocab.json 與 merges.txt "
        "的資料夾，或 ComfyUI、Forge 的資料夾；或安裝附有詞彙表的 clip-anytorch"
    ),
    "base {file} reads {words} words where CLIP's tokenizer has {count}: set model.tokenizer": (
        "基礎模型 {file} 讀 {words} 個詞，CLIP 的分詞器有 {count} 個：請設定 model.tokenizer"
    ),
    "{name} of base {path} is damaged: get the base again": "基礎模型 {path} 的 {name} 已損壞：請重新取得",
    "{name} of base {path} knows {count} words where its text encoder has {rows}: get the base again": (
        "基礎模型 {path} 的 {name} 有 {count} 個詞，文字編碼器卻有 {rows} 個：請重新取得"
    ),
    "{base} lacks {tensor}: get the base again": "{base} 缺少 {tensor}：請重新取得基礎模型",
    "{base} has {tensor} in the shape {shape} where {what} has {other}: get the base again": (
        "{base} 的 {tensor} 形狀是 {shape}，但 {what} 是 {other}：請重新取得基礎模型"
    ),
    "{base}: its UNet attends to texts of width {width}, and its text encoders make {other}: get the base again": (
        "{base}：UNet 需要寬度 {width} 的文字，文字編碼器卻是 {other}：請重新取得"
    ),
    "tokenizer {folder} knows {count} words where its text encoder has {words}: {advice}": (
        "分詞器 {folder} 有 {count} 個詞，文字編碼器卻有 {words} 個：請把 model.tokenizer 設為此模型自己的分詞器"
    ),
    "tokenizer {folder} has {count} merges where CLIP's has {merges}: {advice}": (
        "分詞器 {folder} 有 {count} 條合併規則，CLIP 的有 {merges} 條：請把 model.tokenizer 設為此模型自己的分詞器"
    ),
    "tokenizer {folder} is damaged: {advice}": ("分詞器 {folder} 已損壞：請把 model.tokenizer 設為此模型自己的分詞器"),
    "tokenizer: CLIP's, {name} on the hub": "分詞器：CLIP 的，來自模型庫的 {name}",
    "tokenizer: CLIP's, {name} on the hub: it is not on this machine and is fetched once, 1.5 MB": (
        "分詞器：CLIP 的，來自模型庫的 {name}；這台電腦上沒有，將下載一次（1.5 MB）"
    ),
    "tokenizer_3: T5's, {name} on the hub": "tokenizer_3：T5 的，來自模型庫的 {name}",
    "tokenizer_3: T5's, {name} on the hub: it is not on this machine and is fetched once, 1.4 MB": (
        "tokenizer_3：T5 的，來自模型庫的 {name}；這台電腦上沒有，將下載一次（1.4 MB）"
    ),
    "tokenizer: CLIP's, from {place} ({folder})": "分詞器：CLIP 的，取自 {place}（{folder}）",
    "tokenizer: {folder}, as model.tokenizer says": "分詞器：{folder}，依 model.tokenizer",
    "tokenizer: {folder}": "分詞器：{folder}",
    "tokens of the texts are not counted: the base's tokenizer is not on this machine yet": (
        "未計算文字的 token 數：這台電腦上還沒有基礎模型的分詞器"
    ),
    "base {path} predicts {kind}: only {kinds} can be trained": "基礎模型 {path} 預測 {kind}：只能訓練 {kinds}",
    "base {path}: its UNet takes {into} channels, its latents have {latent}; that is not trained": (
        "基礎模型 {path}：UNet 需要 {into} 個通道，latent 卻有 {latent} 個；無法訓練"
    ),
    "{file} is a pickle, which can run code when it is read; convert it once: {how}": (
        "{file} 是 pickle，讀取時可能執行程式碼；請轉換一次：{how}"
    ),
    "{file} is missing in {folder}: get the base again": "{folder} 中缺少 {file}：請重新取得基礎模型",
    "{file} is missing in {folder}": "{folder} 中缺少 {file}",
    "{file} is missing: {index} speaks of it; get it again": "缺少 {file}：{index} 提到了它；請重新取得",
    "{file} is not valid JSON: get the base again": "{file} 不是有效的 JSON：請重新取得基礎模型",
    "{file} does not hold a JSON object: get the base again": "{file} 中不是 JSON 物件：請重新取得基礎模型",
    "{file} has a tensor {name} that Stable Diffusion does not have": (
        "{file} 中有 Stable Diffusion 所沒有的張量 {name}"
    ),
    "base {name} is not in the cache and HF_HUB_OFFLINE is set: unset it once, or give a folder or a file": (
        "基礎模型 {name} 不在快取中，而 HF_HUB_OFFLINE 已設定：請取消一次，或指定資料夾或檔案"
    ),
    "base {name}: {repository} has no such file; its .safetensors files: {files}": (
        "基礎模型 {name}：{repository} 沒有這個檔案；它的 .safetensors 檔：{files}"
    ),
    "base {name} is not a safetensors file: give another file": ("基礎模型 {name} 不是 safetensors 檔：請指定別的檔案"),
    "base {name} has no {file}, only weights that are not read here": (
        "基礎模型 {name} 沒有 {file}，只有這裡不讀取的權重"
    ),
    "{file}: no such file": "{file}：沒有這個檔案",
    "{file}: cannot be read: {why}": "{file}：無法讀取：{why}",
    "{file}: the file is empty": "{file}：檔案是空的",
    "{file}: not a safetensors file": "{file}：不是 safetensors 檔",
    "{file}: cut off inside its header ({size} bytes): download it again": (
        "{file}：檔頭不完整（{size} 位元組）：請重新下載"
    ),
    "vae: {place}, as model.vae says": "VAE：{place}，依 model.vae",
    "model.vae: {name} does not exist: give a folder, a .safetensors file or a hub id": (
        "model.vae：{name} 不存在：請給資料夾、.safetensors 檔或 hub 識別名"
    ),
    "model.vae: {path} has no config.json: give a folder in diffusers layout, or a file": (
        "model.vae：{path} 沒有 config.json：請給 diffusers 格式的資料夾，或一個檔案"
    ),
    "model.vae: {file} has no encoder and decoder of Stable Diffusion's VAE: give a VAE": (
        "model.vae：{file} 沒有 Stable Diffusion VAE 的編碼器與解碼器：請給一個 VAE"
    ),
    "model.vae: {file} is called like a VAE of another family than {family}: colors may be wrong": (
        "model.vae：{file} 的名稱像是 {family} 以外系列的 VAE：顏色可能不對"
    ),
    "model.vae: {name} is not in the cache and HF_HUB_OFFLINE is set: unset it once; or give a folder or a file": (
        "model.vae：{name} 不在快取中，而且設了 HF_HUB_OFFLINE：請取消一次，或給資料夾或檔案"
    ),
    "model.vae: {name}; or give a folder or a file": "model.vae：{name}；或指定資料夾或檔案",
    "model.vae: {file} is a pickle, which can run code when it is read; {how}": (
        "model.vae：{file} 是 pickle，讀取時可能執行程式碼；{how}"
    ),
    "model.vae: {name} {why}: give a VAE of its family": "model.vae：{name} {why}：請給同系列的 VAE",
    "cannot load {part} {path}: {why}": "無法載入 {part} {path}：{why}",
    "base {path} lacks {parts}: get the base again, or give a VAE by model.vae (--vae)": (
        "基礎模型 {path} 缺少 {parts}：請重新取得，或以 model.vae（--vae）指定 VAE"
    ),
    "{file} does not say what base it was trained on: give it with --base": (
        "{file} 沒有說明用哪個基礎模型訓練：請以 --base 指定"
    ),
    "{file} was trained on {base}, which is not found here: give {how}": (
        "{file} 以 {base} 訓練，這裡找不到它：請指定 {how}"
    ),
}
