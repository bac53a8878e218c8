"""繁體中文：訓練、作圖與 adapter 的訊息；見 `zh_hant_sentences.py`。"""

_RUNS = {
    "{when}; go on with: lorakit resume {folder}": "{when}；要繼續請執行：lorakit resume {folder}",
    "stopped after step {step}": "在第 {step} 步之後停止",
    "stopped before the first step": "在第一步之前停止",
    "stopping: {consequence}": "正在停止：{consequence}",
    "step {step} is saved and exported": "第 {step} 步會儲存並匯出",
    "the samples are not finished": "樣張沒有畫完",
    "the validation is not finished": "驗證沒有做完",
    "{path} is not a run folder: {why}": "{path} 不是執行資料夾：{why}",
    "it has no config.toml": "沒有 config.toml",
    "it is a file": "它是檔案",
    "there is no such folder": "沒有這個資料夾",
    "{path} is not a run folder: it has no state.json": "{path} 不是執行資料夾：沒有 state.json",
    "{folder} is not empty and nothing in it is overwritten; give another --output": (
        "{folder} 不是空的，其中的內容不會被覆寫；請換一個資料夾"
    ),
    ", or go on with: lorakit resume {path}": "，或繼續執行：lorakit resume {path}",
    "unknown": "不明",
    "a log of the run cannot be written ({reason}); the run goes on without it": (
        "無法寫入執行紀錄（{reason}）；訓練會繼續"
    ),
    "step {step}: the samples": "第 {step} 步的樣張",
    "step {step}: the adapter": "第 {step} 步的 adapter",
    "step {step}: the list of checkpoints": "第 {step} 步的檢查點清單",
    "the report": "報告",
    "the preview": "預覽圖",
    "step {step}: {name} is not finite, so no checkpoint was written; lower the learning rate": (
        "第 {step} 步：{name} 不是有限的數字，因此沒有寫入檢查點；請調低學習率"
    ),
    "step {step}: {name} is not finite; lower the learning rate": ("第 {step} 步：{name} 不是有限的數字；請調低學習率"),
    "step {step}: {run} is gone: it was deleted or moved while it was trained in, so nothing can be saved; start it "
    "again": "第 {step} 步：{run} 不見了：訓練途中被刪除或移走，無法儲存；請重新開始",
    "step {step}: no checkpoint could be written to {folder} ({reason}); those before it are intact. Make {size} free "
    "there and the folder writable, then continue with: lorakit resume {run}": (
        "第 {step} 步：無法把檢查點寫入 {folder}（{reason}）；之前的都完好。請在那裡騰出 {size} 並讓資料夾可寫入，"
        "再執行：lorakit resume {run}"
    ),
    "{path} has changed since it was saved; resume from another checkpoint": (
        "{path} 儲存之後被更動過；請從另一個檢查點繼續"
    ),
    "{path} is not a complete checkpoint ({problem}); resume from another one": (
        "{path} 不是完整的檢查點（{problem}）；請從另一個繼續"
    ),
    "{path}: {name} is not finite; resume from another checkpoint": (
        "{path}：{name} 不是有限的數字；請從另一個檢查點繼續"
    ),
    "the {what} changed since {path} was saved, so the run cannot go on exactly where it stopped; start a new one from "
    "its weights with: {command}": (
        "{path} 儲存之後 {what} 有變動，無法從停下的地方接著訓練；要從它的權重開始新的訓練：{command}"
    ),
    "{path} was saved with another config: {differences}; a resumed run goes on exactly as it began. Undo that, or "
    "start a new run from its weights with: {command}": (
        "{path} 是以不同的設定儲存的：{differences}；繼續的訓練必須和開始時一樣。請改回來，"
        "或從它的權重開始新的訓練：{command}"
    ),
    "{problem}; it is passed over": "{problem}；略過它",
    "{file} lacks tensor {names}; resume from another checkpoint": "{file} 缺少張量 {names}；請從另一個檢查點繼續",
    "{file} has an unknown tensor {names}; resume from another checkpoint": (
        "{file} 有不明的張量 {names}；請從另一個檢查點繼續"
    ),
    "{path}: not a checkpoint inside a run folder": "{path}：不是執行資料夾裡的檢查點",
    "{path}: a checkpoint of a whole model is no adapter: set train.export_every, and a run writes models as it goes "
    "on": "{path}：整個模型的檢查點不是 adapter：請設 train.export_every，訓練途中就會寫出模型",
    "{plan_file} is not there or damaged; the checkpoints beside it are not": (
        "{plan_file} 不存在或已損壞；旁邊的檢查點不受影響"
    ),
    "step {number}: gradients overflow in fp16, so the step is skipped ({skipped} so far)": (
        "第 {number} 步：fp16 的梯度溢位，略過這一步（至今 {skipped} 次）"
    ),
    "{line}; their scale is {scale} now": "{line}；縮放倍率現在是 {scale}",
    "step {number}: the {figure} is not finite ({names}); {advice}{intact}": (
        "第 {number} 步：{figure}不是有限的數字（{names}）；{advice}{intact}"
    ),
    "lower optimizer.learning_rate": "請調低 optimizer.learning_rate",
    "lower optimizer.learning_rate or use memory.mixed_precision = 'fp32'": (
        "請調低 optimizer.learning_rate，或用 memory.mixed_precision = 'fp32'"
    ),
    "gradient": "梯度",
    "loss": "損失",
    "; {checkpoint} is intact": "；{checkpoint} 完好",
    "{problem}; going back to {latest} once, with other noise": "{problem}；回到 {latest} 一次，改用其他雜訊",
    "step {step}: not enough memory to draw samples; training goes on without them": (
        "第 {step} 步：記憶體不足以畫樣張；略過樣張繼續訓練"
    ),
    "{run}: cannot be written ({reason}); make room there, then continue with: lorakit resume {folder}": (
        "{run}：無法寫入（{reason}）；請騰出空間，再執行：lorakit resume {folder}"
    ),
    "going on from {newest}, the newest whole checkpoint": "從 {newest} 繼續，這是最新的完整檢查點",
    "the last step is saved; make room, then continue with: lorakit resume {folder}": (
        "最後一步已儲存；請騰出空間，再執行：lorakit resume {folder}"
    ),
    "{problem}; {way}": "{problem}；{way}",
    "{loss}; {intact}, continue with: lorakit resume {folder}": "{loss}；{intact}，請執行：lorakit resume {folder}",
    "there is no checkpoint yet": "還沒有檢查點",
    "{preview} is there already and stays as it is": "{preview} 已經存在，保持原樣",
    "the run now has {after} steps, not {before}; the learning rate at step {step} is {rate}{change}": (
        "總步數現在是 {after}，原為 {before}；第 {step} 步的學習率為 {rate}{change}"
    ),
    ", not {old}: {schedule} now ends at step {end}": "，原為 {old}：{schedule} 現在到第 {end} 步結束",
    "ok: {name}: {detail}": "通過：{name}：{detail}",
    "FAILED: {name}: {detail}": "未通過：{name}：{detail}",
    "device: {device}, base in {dtype}{placement}, {adapter}": (
        "裝置：{device}，基礎模型為 {dtype}{placement}，{adapter}"
    ),
    "cpu ({threads})": "cpu（{threads}）",
    " (the UNet's weights kept in {places})": "（UNet 的權重存放於 {places}）",
    "trained in it": "以此訓練",
    "adapter in float32": "adapter 為 float32",
}
_CHECKS = {
    "{format} file": "{format} 檔案",
    "{format} in diffusers": "{format}，以 diffusers 讀取",
    "{format} unet": "{format}，UNet",
    "{format} text encoder": "{format}，文字編碼器",
    "{format} weights": "{format} 的權重",
    "{layer}: not applied": "{layer}：沒有套用",
    "{layer}: {problem}": "{layer}：{problem}",
    "{weight}: missing": "{weight}：缺少",
    "{weight}: not as trained": "{weight}：與訓練所得不同",
    "{count} of {count} weights read again, each as trained": "重新讀取 {count} 個權重，皆與訓練所得相同",
    "rank {rank} holds {part} of what training changed in its layers": "秩 {rank} 保有訓練改變的 {part}",
    "training changed no layer that a LoRA can hold: raise optimizer.learning_rate": (
        "訓練沒有改變任何 LoRA 能保存的層：請提高 optimizer.learning_rate"
    ),
}
_LOADING = {
    "training {component}: {modules} modules, {parameters} parameters": (
        "訓練 {component}：{modules} 個模組，{parameters} 個參數"
    ),
    "starting from the weights of {init_from}": "從 {init_from} 的權重開始",
    "the UNet has a block that lorakit cannot fuse ({block}): memory.engine = 'plain' is used. {slower}": (
        "UNet 有 lorakit 無法融合的區塊（{block}）：改用 memory.engine = 'plain'。{slower}"
    ),
    "Training is correct, only slower.": "訓練結果正確，只是較慢。",
    "CUDA graphs are off, training continues without them: {problem}": "不使用 CUDA graph，訓練照常繼續：{problem}",
    "CUDA graphs are off: {problem}. {slower}": "不使用 CUDA graph：{problem}。{slower}",
    "CUDA graphs are on: each batch shape is captured at its first step, at most {max_graphs}": (
        "使用 CUDA graph：每種批次形狀在第一步擷取，最多 {max_graphs} 種"
    ),
    "the optimizer step runs without a CUDA graph: {problem}": "最佳化器的一步不使用 CUDA graph：{problem}",
    "batches of further shapes run uncompiled: at most {MAX_GRAPHS} are compiled": (
        "其他形狀的批次不編譯：最多編譯 {MAX_GRAPHS} 種"
    ),
    "attention: sdpa{without}": "attention：sdpa{without}",
    "attention: sdpa, because xformers failed its self-test ({problem})": (
        "attention：sdpa，因為 xformers 未通過自我測試（{problem}）"
    ),
    "attention: xformers, which agrees with sdpa forward and backward": "attention：xformers，與 sdpa 的結果一致",
    " without {wrong}, because its self-test failed ({first})": "，不用 {wrong}，因為自我測試未通過（{first}）",
    "float32 products: {where}": "float32 乘法：{where}",
    "in TF32 where the card has it": "顯示卡支援時用 TF32",
    "in full": "完整精度",
    "class images: {cached} of {count} in the cache, {missing} to draw ({prompt}){suffix}": (
        "類別圖片：{count} 張中快取有 {cached} 張，要畫 {missing} 張（{prompt}）{suffix}"
    ),
    "; {count} in the cache were damaged and are drawn again": "；快取中有 {count} 張已損壞，重新繪製",
    "memory.device = {device}: {providers} does not start here; memory.device = 'cpu' takes the processor": (
        "memory.device = {device}：{providers} 無法在這裡啟動；memory.device = 'cpu' 會用處理器"
    ),
    "memory.device = {device}: onnxruntime has no {providers} here; memory.device = 'cpu' takes the processor": (
        "memory.device = {device}：這裡的 onnxruntime 沒有 {providers}；memory.device = 'cpu' 會用處理器"
    ),
    "captioner {model}: {file} takes {shape}, a WD tagger takes one picture [1, side, side, 3]": (
        "說明模型 {model}：{file} 需要 {shape}，WD 標籤模型需要一張圖 [1, side, side, 3]"
    ),
    "{path}: not a table with the columns name and category; get the model again": (
        "{path}：不是含 name 與 category 欄的表格；請重新取得模型"
    ),
    "{tags} names {count} tags, and the network has {outputs}": "{tags} 有 {count} 個標籤，網路卻有 {outputs} 個",
    "captioner {problem}; or give a folder": "說明模型 {problem}；或指定資料夾",
    "a model ({kind}) that needs code of its own, which lorakit does not run; give one that transformers has, such as "
    "florence-community/Florence-2-base": (
        "這個模型（{kind}）需要執行它自帶的程式，lorakit 不執行；"
        "請用 transformers 內建的，例如 florence-community/Florence-2-base"
    ),
    "a model of the type {kind} is no captioner; give BLIP, Florence-2, SmolVLM or Qwen-VL": (
        "類型為 {kind} 的模型不會撰寫說明；請用 BLIP、Florence-2、SmolVLM 或 Qwen-VL"
    ),
    "of no type": "沒有類型",
    "(none)": "（無）",
    "{adapter} does not say what its trigger is; give a --prompt": "{adapter} 沒有說明觸發詞；請填提示詞",
    "{name} was made for {family} and {info} is {family_2}; give its --base": (
        "{name} 是為 {family} 製作的，而 {info} 是 {family_2}；請指定它的基礎模型"
    ),
    "clip skip {clip_skip}, as the adapter or --set says": "CLIP skip {clip_skip}，依 adapter 或設定",
}
_ADAPTERS = {
    "the adapter is for {family}, the base is {other}": "adapter 是給 {family} 的，基礎模型是 {other}",
    "the base has no layer {missing}, which the adapter adapts ({count} such)": (
        "基礎模型沒有 adapter 所改的層 {missing}（共 {count} 個）"
    ),
    "{name} is {expected} in the base, {actual} in the adapter: it is for another base": (
        "{name} 在基礎模型中是 {expected}，在 adapter 中是 {actual}：它屬於別的基礎模型"
    ),
    "the adapter has vectors for {word} and {other}: only one word can be applied": (
        "adapter 有 {word} 與 {other} 的向量：只能套用一個詞"
    ),
    "the embedding of {word} does not fit {part}: it is for another base": (
        "{word} 的詞向量不符合 {part}：它屬於別的基礎模型"
    ),
    "{component} already carries an adapter: take it out first (unload_lora_weights)": (
        "{component} 已經有 adapter：請先移除（unload_lora_weights）"
    ),
    "{option}: {pattern} matches none of the {count} adapted layers; {hint}": (
        "{option}：{count} 個訓練層中沒有符合 {pattern} 的；{hint}"
    ),
    "{pattern} matches {count}": "{pattern} 符合 {count} 層",
    "layers are such as {names}": "層名例如 {names}",
    "there are none": "一個也沒有",
    "{method} begins from the base's own weights and not from an adapter: set adapter.method = 'lora'": (
        "{method} 從基礎模型自己的權重開始，不是從 adapter：請設 adapter.method = 'lora'"
    ),
    "the adapter to start from has other layers: {count} lacking, {more} too many, e.g. {missing}; set "
    "adapter.target_modules and train_text_encoder as it was made": (
        "起始 adapter 的層不同：少 {count} 個，多 {more} 個，例如 {missing}；"
        "請依它當初的設定填 adapter.target_modules 與 train_text_encoder"
    ),
    "the adapter to start from has ranks {ranks}: make them one with lorakit resize FILE --rank {rank}": (
        "起始 adapter 有多種秩 {ranks}：請以 lorakit resize FILE --rank {rank} 統一"
    ),
    "the adapter to start from has rank {rank} in {name}: set adapter.rank = {rank}": (
        "起始 adapter 在 {name} 的秩是 {rank}：請設 adapter.rank = {rank}"
    ),
    "the adapter to start from has another shape in {name}: it is of another base": (
        "起始 adapter 在 {name} 的形狀不同：它屬於別的基礎模型"
    ),
    "the adapter to start from has {count} vectors for {word}: set adapter.new_tokens = {count} and begin data.name "
    "with {word}": (
        "起始 adapter 有 {word} 的 {count} 個向量：請設 adapter.new_tokens = {count}，data.name 以 {word} 開頭"
    ),
    "the checkpoint does not fit this {what}: {wrong} ({count} such)": (
        "檢查點不符合這個 {what}：{wrong}（共 {count} 個）"
    ),
    "the adapter has {what}, which lorakit does not put into a model in use: merge it into a base": (
        "adapter 有 {what}，lorakit 不會放進使用中的模型：請合併到基礎模型"
    ),
    "{method} is computed from the weights of a base and has no change without it: merge it into its base first, then "
    "extract a LoRA from the merged model": (
        "{method} 由基礎模型的權重計算而來，沒有它就沒有變化：請先合併到它的基礎模型，再從合併後的模型取出 LoRA"
    ),
}
_PAGES = {
    "{name}: its settings are not there": "{name}：找不到它的設定",
    "{name}: there is no such file": "{name}：沒有這個檔案",
    "{name}: no such picture": "{name}：沒有這張圖",
    "quality = {quality}: must be one of {names}": "quality = {quality}：必須是 {names} 其中之一",
    "{run} has ended at step {step}: give more steps than that": "{run} 已在第 {step} 步結束：請填入更多步數",
    "{name}: must be {kind}": "{name}：必須是 {kind}",
}

TRAINING = {**_RUNS, **_CHECKS, **_LOADING, **_ADAPTERS, **_PAGES}
