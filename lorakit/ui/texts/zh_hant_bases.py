"""繁體中文：關於基礎模型、分詞器與模型檔的話（families/*、core/safetensors_header.py）。見 `zh_hant_sentences.py`。"""

BASES = {
    "base {name} is trained as one that predicts epsilon, but {what} speaks of v-prediction: find out with {command}, "
    "and set model.prediction_type": (
        "基礎模型 {name} 當作預測 epsilon 來訓練，但有 v-prediction 的跡象：請以 {command} 確認，"
        "並設定 model.prediction_type"
    ),
    "distilled model ({kind}, {why:said}): samples take {steps} steps at guidance {guidance} unless sample.steps and "
    "sample.guidance are set": (
        "蒸餾模型（{kind}，{why:said}）：除非設定 sample.steps 與 sample.guidance，樣張用 {steps} 步、"
        "引導強度 {guidance}"
    ),
    "distilled model ({kind}, {why:said}): samples take 1 step at guidance {guidance} unless sample.steps and "
    "sample.guidance are set": (
        "蒸餾模型（{kind}，{why:said}）：除非設定 sample.steps 與 sample.guidance，樣張用 1 步、引導強度 {guidance}"
    ),
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
    "base {path} is not a folder in diffusers layout: no model_index.json; it is empty": (
        "{path} 不是 diffusers 格式的資料夾：沒有 model_index.json；資料夾是空的"
    ),
    "base {path} is not a folder in diffusers layout: no model_index.json; it holds {names}": (
        "{path} 不是 diffusers 格式的資料夾：沒有 model_index.json；裡面是 {names}"
    ),
    "base {path} is a {kind}; lorakit trains {families}": (
        "{path} 是 {kind}；lorakit 可訓練 Stable Diffusion 1.x、2.x、XL 與 3"
    ),
    "{file} is {kind}; in one file lorakit reads Stable Diffusion 1.x, 2.x and XL": (
        "{file} 是其他模型（{kind}）；單一檔案只能是 Stable Diffusion 1.x、2.x 或 XL"
    ),
    "keys that are not of such a model, ignored: {keys}": "略過不屬於這種模型的鍵：{keys}",
    "{file} has {key}, a scale that belongs to no weight: get the file in fp16": (
        "{file} 有 {key}，這個縮放係數不屬於任何權重：請改用 fp16 的檔案"
    ),
    "{file} has {key} in {dtype}, a quantization not read here: get it in fp16": (
        "{file} 的 {key} 是 {dtype}，無法讀取這種量化：請改用 fp16 的檔案"
    ),
    "{file} lacks {tensor}: get the whole checkpoint": "{file} 缺少 {tensor}：請取得完整的模型",
    "{file} lacks {part}, which its other blocks have: get the whole checkpoint": (
        "{file} 缺少 {part}，其他區塊都有：請取得完整的模型檔"
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
    "without {encoder}": "沒有 {encoder}",
    "without {encoder}, as model.t5 says": "不使用 {encoder}，依 model.t5",
    "{encoder}: {path}": "{encoder}：{path}",
    "base {path} has no T5: leave model.t5": "基礎模型 {path} 沒有 T5：請勿更改 model.t5",
    "base {file} has T5 and no tokenizer for it on this machine, and HF_HUB_OFFLINE is set: {ways}": (
        "基礎模型 {file} 有 T5，這台電腦上卻沒有它的分詞器，且已設定 HF_HUB_OFFLINE：請把 model.tokenizer "
        "設為含 tokenizer_3/tokenizer.json 的資料夾或 ComfyUI 的資料夾；或設 model.t5 = false，不使用 T5"
    ),
    "base {file} has T5 and no tokenizer for it on this machine, and T5's cannot be fetched from {hub} ({reason}): "
    "{ways}": (
        "基礎模型 {file} 有 T5，這台電腦上卻沒有它的分詞器，也無法從 {hub} 下載（{reason}）：請把 model.tokenizer "
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
    "base {file}: {tensor} is missing: get the whole checkpoint": ("基礎模型 {file} 缺少 {tensor}：請取得完整的模型"),
    "base {file}: {tensor} has a shape that no such model has: get the whole checkpoint": (
        "基礎模型 {file} 的 {tensor} 形狀不屬於這種模型：請取得完整的模型"
    ),
    "{file} has {tensor} in {rows} rows, which are not 3 equal shares: get the whole checkpoint": (
        "{file} 的 {tensor} 有 {rows} 列，無法分成相等的 3 份：請取得完整的模型"
    ),
    "base {file} has its own text encoders: leave model.text_encoders": (
        "基礎模型 {file} 自有文字編碼器：請不要設定 model.text_encoders"
    ),
    "base {path} has its own text encoders: model.text_encoders is for bases in a single file": (
        "基礎模型 {path} 自有文字編碼器：model.text_encoders 只用於單一檔案的基礎模型"
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
    "base {path} has its own tokenizer: model.tokenizer is for bases in a single file": (
        "基礎模型 {path} 自有分詞器：model.tokenizer 只用於單一檔案的基礎模型"
    ),
    "base {file} has no tokenizer with it, and HF_HUB_OFFLINE is set: {ways}": (
        "基礎模型 {file} 沒有附分詞器，而且設了 HF_HUB_OFFLINE：請把 model.tokenizer 設為有 vocab.json 與 merges.txt "
        "的資料夾，或 ComfyUI、Forge 的資料夾；或安裝附有詞彙表的 clip-anytorch"
    ),
    "base {file} has no tokenizer with it, and CLIP's cannot be fetched from {hub} ({reason}): {ways}": (
        "基礎模型 {file} 沒有附分詞器，也無法從 {hub} 取得 CLIP 的分詞器（{reason}）：請把 model.tokenizer 設為有 "
        "vocab.json 與 merges.txt 的資料夾，或 ComfyUI、Forge 的資料夾；或安裝附有詞彙表的 clip-anytorch"
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
    "tokenizer_3: {folder}": "tokenizer_3：{folder}",
    "tokenizer: CLIP's, from {place} ({folder})": "分詞器：CLIP 的，取自 {place}（{folder}）",
    "tokenizer: {folder}, as model.tokenizer says": "分詞器：{folder}，依 model.tokenizer",
    "tokenizer: {folder}": "分詞器：{folder}",
    "tokens of the texts are not counted: the base's tokenizer is not on this machine yet": (
        "未計算文字的 token 數：這台電腦上還沒有基礎模型的分詞器"
    ),
    "base {path} predicts {kind}: only {kinds} can be trained": "基礎模型 {path} 預測 {kind}：只能訓練 {kinds:words}",
    "base {path}: its UNet takes {into} channels, its latents have {latent}; that is not trained": (
        "基礎模型 {path}：UNet 需要 {into} 個通道，latent 卻有 {latent} 個；無法訓練"
    ),
    "base {file} is an adapter (LoRA), not a base model: give the model that it was made for": (
        "{file} 是 adapter（LoRA），不是基礎模型：請指定它所屬的模型"
    ),
    "base {path} is an {kind}; lorakit trains {families}": "{path} 是 {kind}；lorakit 能訓練 {families}",
    "base {path} reads texts by a {kind}, as no Stable Diffusion does; lorakit trains {families}": (
        "{path} 以 {kind} 讀文字，不是 Stable Diffusion；lorakit 能訓練 {families}"
    ),
    "base {file} is an IP-Adapter, not a base model": "{file} 是 IP-Adapter，不是基礎模型",
    "base {file} is an AnimateDiff motion module, not a base model": "{file} 是 AnimateDiff 的動態模組，不是基礎模型",
    "base {file} is a T2I-Adapter, not a base model": "{file} 是 T2I-Adapter，不是基礎模型",
    "base {file} is an upscaler (ESRGAN and the like), not a base model": (
        "{file} 是放大模型（ESRGAN 之類），不是基礎模型"
    ),
    "base {file} is a VAE for previews (TAESD), not a base model": "{file} 是預覽用的 VAE（TAESD），不是基礎模型",
    "base {file} is a text encoder (T5) alone: give the whole model": "{file} 只有文字編碼器（T5）：請指定完整的模型",
    "base {file} is an image encoder alone: give the whole model": "{file} 只有圖片編碼器：請指定完整的模型",
    "base {file} is a language model, not a base model": "{file} 是語言模型，不是基礎模型",
    "base {file} is a transformer alone: give the whole model": "{file} 只有 transformer：請指定完整的模型",
    "base {file} is Stable Diffusion 3's transformer alone: give the whole model": (
        "{file} 只有 Stable Diffusion 3 的 transformer：請指定完整的模型"
    ),
    "base {path} is a PEFT adapter, not a base model": "{path} 是 PEFT adapter，不是基礎模型",
    "base {file} is a UNet alone: give the whole model": "{file} 只有 UNet：請指定完整的模型",
    "base {file} is a VAE alone, not a base model": "{file} 只有 VAE，不是基礎模型",
    "base {file} is a text encoder alone: give the whole model": "{file} 只有文字編碼器：請指定完整的模型",
    "base {file} is a textual-inversion embedding, not a base model": (
        "{file} 是詞向量（textual inversion），不是基礎模型"
    ),
    "base {file} is a ControlNet, not a base model": "{file} 是 ControlNet，不是基礎模型",
    "base {file} is a safetensors file of no kind known here: give a Stable Diffusion model": (
        "{file} 是無法辨識的 safetensors 檔：請指定 Stable Diffusion 模型"
    ),
    "base {file} is a file, not a base model: give a .safetensors file or a folder in diffusers layout": (
        "{file} 是檔案，但不是基礎模型：請指定 .safetensors 檔，或 diffusers 格式的資料夾"
    ),
    "base {file} is a pickle, which can run code when it is read; convert it once: {how}": (
        "{file} 是 pickle，讀取時可能執行程式碼；請轉換一次：{how}"
    ),
    "{file} is a pickle, which can run code when it is read; convert it once: {how}": (
        "{file} 是 pickle，讀取時可能執行程式碼；請轉換一次：{how}"
    ),
    "base {name} has no {file}, only pickles ({pickle}): download it and run: {how}": (
        "基礎模型 {name} 沒有 {file}，只有 pickle（{pickle}）：請下載後執行：{how}"
    ),
    "base {name} has no {file}, only pickles ({pickle}): try {other}, where the hub's bot often offers .safetensors, "
    "or download it and run: {how}": (
        "基礎模型 {name} 沒有 {file}，只有 pickle（{pickle}）：請試 {other}（hub 的機器人常在那裡提供 .safetensors），"
        "或下載後執行：{how}"
    ),
    "{file} is missing in {folder}: get the base again": "{folder} 中缺少 {file}：請重新取得基礎模型",
    "{file} is missing in {folder}: model.tokenizer must name a folder with both, or a base's": (
        "{folder} 中缺少 {file}：model.tokenizer 必須是兩者都有的資料夾，或某個基礎模型的分詞器"
    ),
    "{file} is missing in {folder}": "{folder} 中缺少 {file}",
    "{file} is missing: {index} speaks of it; get it again": "缺少 {file}：{index} 提到了它；請重新取得",
    "{file} is not valid JSON: get the base again": "{file} 不是有效的 JSON：請重新取得基礎模型",
    "{file} does not hold a JSON object: get the base again": "{file} 中不是 JSON 物件：請重新取得基礎模型",
    "{file} lacks its {part} ({keys}): get the whole checkpoint": "{file} 缺少 {part}（{keys}）：請取得完整的模型",
    "{file} is SDXL's refiner, which no adapter is trained on: give the SDXL base": (
        "{file} 是 SDXL 的 refiner，不能訓練 adapter：請指定 SDXL base"
    ),
    "{file} has a tensor {name} that Stable Diffusion does not have": (
        "{file} 中有 Stable Diffusion 所沒有的張量 {name}"
    ),
    "base {name} is not in the cache and HF_HUB_OFFLINE is set: unset it once, or give a folder or a file": (
        "基礎模型 {name} 不在快取中，而 HF_HUB_OFFLINE 已設定：請取消一次，或指定資料夾或檔案"
    ),
    "base {name} is gated: accept its terms at {page} and log in with: hf auth login; or give a folder or a file": (
        "基礎模型 {name} 需要授權：請在 {page} 同意條款，並以 hf auth login 登入；或指定資料夾或檔案"
    ),
    "base {name} is not on the hub, or is private: look at {page}, and log in with: hf auth login; "
    "or give a folder or a file": (
        "hub 上沒有基礎模型 {name}，或它不公開：請看 {page}，並以 hf auth login 登入；或指定資料夾或檔案"
    ),
    "base {name} has no revision {revision}: look at {page}; or give a folder or a file": (
        "基礎模型 {name} 沒有版本 {revision}：請看 {page}；或指定資料夾或檔案"
    ),
    "base {name} is not in the cache and cannot be fetched from {hub} ({why}): try again later; "
    "or give a folder or a file": (
        "基礎模型 {name} 不在快取中，也無法從 {hub} 下載（{why}）：請稍後再試，或指定資料夾或檔案"
    ),
    "base {name} is not in diffusers layout (no model_index.json)": (
        "基礎模型 {name} 不是 diffusers 格式（沒有 model_index.json）"
    ),
    "base {name} is not in diffusers layout (no model_index.json); give {file}": (
        "基礎模型 {name} 不是 diffusers 格式（沒有 model_index.json）；請指定 {file}"
    ),
    "base {name}: {repository} has no such file; its .safetensors files: {files}": (
        "基礎模型 {name}：{repository} 沒有這個檔案；它的 .safetensors 檔：{files}"
    ),
    "base {link} is a part of a model: give {name} for the whole model": (
        "{link} 只是模型的一部分：請指定 {name}（完整的模型）"
    ),
    "base {name} is not a safetensors file: give another file": ("基礎模型 {name} 不是 safetensors 檔：請指定別的檔案"),
    "base {name} cannot be fetched: the hub refuses this machine's token ({why}); log in again with: hf auth login, "
    "or unset HF_TOKEN; or give a folder or a file": (
        "基礎模型 {name} 無法下載：hub 不接受這台電腦的權杖（{why}）；請以 hf auth login 重新登入，"
        "或取消設定 HF_TOKEN；或指定資料夾或檔案"
    ),
    "base {name} cannot be fetched: the hub refuses it ({why}): look at {page} and the token's permissions; or give "
    "a folder or a file": (
        "基礎模型 {name} 無法下載：hub 拒絕了（{why}）：請看 {page} 與權杖的權限；或指定資料夾或檔案"
    ),
    "base {name} is not a file on this machine, and its repository is not on the hub, or is private: look at {page}, "
    "and log in with: hf auth login; or give a folder or a file": (
        "這台電腦上沒有 {name} 這個檔案，hub 上也沒有它的儲存庫，或它不公開："
        "請看 {page}，並以 hf auth login 登入；"
        "或指定資料夾或檔案"
    ),
    "base {name} has no {file}, only weights that are not read here": (
        "基礎模型 {name} 沒有 {file}，只有這裡不讀取的權重"
    ),
    "{file}: no such file": "{file}：沒有這個檔案",
    "{file}: cannot be read: {why}": "{file}：無法讀取：{why}",
    "{file}: the file is empty": "{file}：檔案是空的",
    "{file}: this is a pickle (.ckpt/.pt): it can run code when opened; convert it once: {how}": (
        "{file}：這是 pickle（.ckpt/.pt），開啟時可能執行程式碼；請轉換一次：{how}"
    ),
    "{file}: this is a GGUF file, not safetensors": "{file}：這是 GGUF 檔，不是 safetensors",
    "{file}: this is a Git LFS pointer, not the file itself: fetch it with git lfs pull": (
        "{file}：這只是 Git LFS 指標，不是檔案本身：請用 git lfs pull 取得"
    ),
    "{file}: this is a web page, not a model: the download failed": "{file}：這是網頁，不是模型：下載失敗了",
    "{file}: this is a picture, not a model": "{file}：這是圖片，不是模型",
    "{file}: not a safetensors file": "{file}：不是 safetensors 檔",
    "{file}: cut off inside its header ({size} bytes): download it again": (
        "{file}：檔頭不完整（{size} 位元組）：請重新下載"
    ),
    "{file}: damaged: its safetensors header does not parse": "{file}：檔案損壞：safetensors 檔頭無法解讀",
    "{file}: cut off: {size} of {end} bytes are there ({share} %): download it again": (
        "{file}：檔案不完整：{end} 位元組中只有 {size}（{share} %）：請重新下載"
    ),
    "{file}: damaged: {size} bytes follow its last tensor": "{file}：檔案損壞：最後一個張量之後還有 {size} 位元組",
    "vae: {place}, as model.vae says": "VAE：{place}，依 model.vae",
    "model.vae: {name} does not exist: give a folder, a .safetensors file or a hub id": (
        "model.vae：{name} 不存在：請給資料夾、.safetensors 檔或 hub 識別名"
    ),
    "model.vae: {path} has no config.json: give a folder in diffusers layout, or a file": (
        "model.vae：{path} 沒有 config.json：請給 diffusers 格式的資料夾，或一個檔案"
    ),
    "model.vae: {file} is a pickle, which can run code when it is read; convert it once with diffusers: {code}": (
        "model.vae：{file} 是 pickle，讀取時可能執行程式碼；請用 diffusers 轉換一次：{code}"
    ),
    "model.vae: {file} has no encoder and decoder of Stable Diffusion's VAE: give a VAE": (
        "model.vae：{file} 沒有 Stable Diffusion VAE 的編碼器與解碼器：請給一個 VAE"
    ),
    "model.vae: {file} is called like a VAE of another family than {family}: colors may be wrong": (
        "model.vae：{file} 的名稱像是 {family} 以外系列的 VAE：顏色可能不對"
    ),
    "model.vae: {name} is of class {kind}, and only {own} is read: give a VAE of its family": (
        "model.vae：{name} 的類別是 {kind}，只讀 {own}：請給同系列的 VAE"
    ),
    "model.vae: {name} makes latents of {count} channels, and base {base} takes {into}: give a VAE of its family": (
        "model.vae：{name} 的潛在表示有 {count} 個通道，基礎模型 {base} 要 {into} 個：請給同系列的 VAE"
    ),
    "model.vae: {name} makes latents of another size than those of base {base}: give a VAE of its family": (
        "model.vae：{name} 的潛在表示大小與基礎模型 {base} 的不同：請給同系列的 VAE"
    ),
    "model.vae: {name} has scaling factor {one}, and base {base} has {two}: give a VAE of its family": (
        "model.vae：{name} 的縮放係數為 {one}，基礎模型 {base} 的是 {two}：請給同系列的 VAE"
    ),
    "model.vae: {name} is not in the cache and HF_HUB_OFFLINE is set: unset it once; or give a folder or a file": (
        "model.vae：{name} 不在快取中，而且設了 HF_HUB_OFFLINE：請取消一次，或給資料夾或檔案"
    ),
    "model.vae: {name} has no VAE in diffusers layout: give {file}; or give a folder or a file": (
        "model.vae：{name} 沒有 diffusers 格式的 VAE：請指定 {file}，或資料夾或檔案"
    ),
    "model.vae: {name}; or give a folder or a file": "model.vae：{name}；或指定資料夾或檔案",
    "model.vae: {file} is a pickle, which can run code when it is read; {how}": (
        "model.vae：{file} 是 pickle，讀取時可能執行程式碼；{how}"
    ),
    "model.vae: {name} {why}: give a VAE of its family": "model.vae：{name} {why}：請給同系列的 VAE",
    "cannot load {part} {path}: {why}": "無法載入 {part} {path}：{why}",
    "{file} lacks its {part} ({keys}): get the whole checkpoint, or give one by model.vae (--vae)": (
        "{file} 缺少 {part}（{keys}）：請取得完整的模型，或以 model.vae（--vae）指定"
    ),
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
