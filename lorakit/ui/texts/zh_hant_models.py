"""繁體中文：基礎模型是什麼、從哪裡來；見 `zh_hant_sentences.py`。"""

_WHAT = {
    "base {path} {what}": "{path} {what}",
    "base {path}: {problem}": "基礎模型 {path}：{problem}",
    "base {problem}; or give a folder or a file": "基礎模型 {problem}；或指定資料夾或檔案",
    "is {kind}; lorakit trains {families}": "是 {kind}；lorakit 能訓練 {families}",
    "is {kind} model; lorakit trains {families}": "是 {kind} 模型；lorakit 能訓練 {families}",
    "a {title}": "{title}",
    "an {title}": "{title}",
    "reads texts by a {kind}, as no Stable Diffusion does; lorakit trains {families}": (
        "以 {kind} 讀文字，不是 Stable Diffusion；lorakit 能訓練 {families}"
    ),
    "is a GGUF file of {ours}{part}, whose weights lorakit does not read: give the model's .safetensors file; "
    "memory.base_storage = 'nf4' keeps it as small in memory": (
        "是 {ours} 的 GGUF 檔{part}，lorakit 不讀取其權重：請指定模型的 .safetensors 檔；"
        "memory.base_storage = 'nf4' 讓它在記憶體中一樣小"
    ),
    "'s denoiser alone": "（只有去噪器）",
    "is a GGUF file, whose weights lorakit does not read: give the model's .safetensors file": (
        "是 GGUF 檔，lorakit 不讀取其權重：請指定模型的 .safetensors 檔"
    ),
    "is a pickle, which can run code when it is read; convert it once: lorakit convert FILE": (
        "是 pickle，讀取時可能執行程式碼；請轉換一次：lorakit convert FILE"
    ),
    "is a file, not a base model: give a .safetensors file or a folder in diffusers layout": (
        "是檔案，但不是基礎模型：請指定 .safetensors 檔，或 diffusers 格式的資料夾"
    ),
    "is an adapter (LoRA), not a base model: give the model that it was made for": (
        "是 adapter（LoRA），不是基礎模型：請指定它所屬的模型"
    ),
    "is a UNet alone: give the whole model": "只有 UNet：請指定完整的模型",
    "is a VAE alone, not a base model": "只有 VAE，不是基礎模型",
    "is a text encoder alone: give the whole model": "只有文字編碼器：請指定完整的模型",
    "is a textual-inversion embedding, not a base model": "是詞向量（textual inversion），不是基礎模型",
    "is a ControlNet, not a base model": "是 ControlNet，不是基礎模型",
    "is an IP-Adapter, not a base model": "是 IP-Adapter，不是基礎模型",
    "is a safetensors file of no kind known here: give a Stable Diffusion model": (
        "是無法辨識的 safetensors 檔：請指定 Stable Diffusion 模型"
    ),
    "is an AnimateDiff motion module, not a base model": "是 AnimateDiff 的動態模組，不是基礎模型",
    "is a T2I-Adapter, not a base model": "是 T2I-Adapter，不是基礎模型",
    "is an upscaler (ESRGAN and the like), not a base model": "是放大模型（ESRGAN 之類），不是基礎模型",
    "is a VAE for previews (TAESD), not a base model": "是預覽用的 VAE（TAESD），不是基礎模型",
    "is a text encoder (T5) alone: give the whole model": "只有文字編碼器（T5）：請指定完整的模型",
    "is an image encoder alone: give the whole model": "只有圖片編碼器：請指定完整的模型",
    "is a language model, not a base model": "是語言模型，不是基礎模型",
    "is Stable Diffusion 3's transformer alone: give the whole model": (
        "只有 Stable Diffusion 3 的 transformer：請指定完整的模型"
    ),
    "is a transformer alone: give the whole model": "只有 transformer：請指定完整的模型",
    "is a PEFT adapter, not a base model": "是 PEFT adapter，不是基礎模型",
    "base {path} is not a folder in diffusers layout: no model_index.json; {content}": (
        "基礎模型 {path} 不是 diffusers 格式的資料夾：沒有 model_index.json；{content}"
    ),
    "it holds {names}": "裡面有 {names}",
    "it is empty": "它是空的",
    "base {path} has its own {kind}: model.{option} is for bases in a single file": (
        "基礎模型 {path} 自有 {kind}：model.{option} 只用於單一檔案的基礎模型"
    ),
    "base {name} is a pipeline in memory: give it to train or resume, by pipeline=": (
        "基礎模型 {name} 是記憶體中的 pipeline：請以 pipeline= 傳給 train 或 resume"
    ),
    "without {name}": "沒有 {name}",
    "without {name}, as model.t5 says": "不使用 {name}，依 model.t5",
    "{kind} with zero terminal SNR": "{kind}（終端 SNR 為零）",
    "EDM's noise ({name})": "EDM 的雜訊（{name}）",
    "another noise schedule ({facts})": "另一種雜訊排程（{facts}）",
    "distilled model ({kind}, {evidence}): samples take {steps} at guidance {guidance} unless sample.steps and "
    "sample.guidance are set": (
        "蒸餾模型（{kind}，{evidence}）：樣張用 {steps}、guidance {guidance}，"
        "除非設定了 sample.steps 與 sample.guidance"
    ),
    "base {name} is trained as one that predicts epsilon, but {evidence} speaks of v-prediction: find out with "
    "`lorakit probe {base}`, and set model.prediction_type": (
        "基礎模型 {name} 當作預測 epsilon 來訓練，但 {evidence} 顯示是 v-prediction：請以 `lorakit probe {base}` 確認，"
        "並設定 model.prediction_type"
    ),
    "its name": "它的名稱",
    "its metadata": "它的中繼資料",
    "as every model of its family": "同系列的模型皆如此",
    "as its metadata says ({value})": "依檔案的中繼資料（{value}）",
}
_HUB = {
    "{name} cannot be fetched: the hub refuses this machine's token ({why}); log in again with: hf auth login, or "
    "unset HF_TOKEN": (
        "{name} 無法下載：hub 不接受這台電腦的權杖（{why}）；請以 hf auth login 重新登入，或取消設定 HF_TOKEN"
    ),
    "it is wrong or expired": "錯誤或已過期",
    "{name} is gated: accept its terms at {page} and log in with: hf auth login": (
        "{name} 需要授權：請在 {page} 同意條款，並以 hf auth login 登入"
    ),
    "{name} is not on the hub, or is private: look at {page}, and log in with: hf auth login": (
        "hub 上沒有 {name}，或它不公開：請看 {page}，並以 hf auth login 登入"
    ),
    "{name} is not a file on this machine, and its repository is not on the hub, or is private: look at {page}, and "
    "log in with: hf auth login": (
        "這台電腦上沒有 {name} 這個檔案，hub 上也沒有它的儲存庫，或它不公開：請看 {page}，並以 hf auth login 登入"
    ),
    "{name} has no revision {revision}: look at {page}": "{name} 沒有版本 {revision}：請看 {page}",
    "{name} cannot be fetched: the hub refuses it ({why}): look at {page} and the token's permissions": (
        "{name} 無法下載：hub 拒絕了（{why}）：請看 {page} 與權杖的權限"
    ),
    "{name} is not in the cache and cannot be fetched from {hub} ({why}): try again later": (
        "{name} 不在快取中，也無法從 {hub} 下載（{why}）：請稍後再試"
    ),
    "the environment names a SOCKS proxy, which needs: {command}": "環境設定了 SOCKS 代理，需要：{command}",
    "base {title} is not in diffusers layout (no model_index.json){instead}": (
        "基礎模型 {title} 不是 diffusers 格式（沒有 model_index.json）{instead}"
    ),
    "base {title} has no {missing}, only pickles ({pickle}): {offer}download it and run: lorakit convert FOLDER": (
        "基礎模型 {title} 沒有 {missing}，只有 pickle（{pickle}）：{offer}請下載後執行：lorakit convert FOLDER"
    ),
    "try {repository}@refs/pr/1, where the hub's bot often offers .safetensors, or ": (
        "請試 {repository}@refs/pr/1（hub 的機器人常在那裡提供 .safetensors），或"
    ),
    "base {file} has {what} cannot be fetched from {hub} ({reason}): {ways}": (
        "基礎模型 {file} 有 {what} 無法從 {hub} 取得（{reason}）：{ways}"
    ),
    "no tokenizer with it, and CLIP's": "（沒有附分詞器）CLIP 的分詞器",
    "set model.tokenizer to a folder with vocab.json and merges.txt, or to that of ComfyUI or Forge; or install "
    "clip-anytorch, which brings the vocabulary": (
        "請把 model.tokenizer 設為有 vocab.json 與 merges.txt 的資料夾，或 ComfyUI、Forge 的資料夾；"
        "或安裝附有詞彙表的 clip-anytorch"
    ),
    "set model.tokenizer to the folder of the base's own": "請把 model.tokenizer 設為此模型自己的分詞器",
    "model.tokenizer must name a folder with both, or a base's": (
        "model.tokenizer 必須是兩者都有的資料夾，或某個基礎模型的分詞器"
    ),
    "get the base again": "請重新取得基礎模型",
    "model.tokenizer: {folder} does not exist": "model.tokenizer：{folder} 不存在",
    "{file} is missing in {folder}: {advice}": "{folder} 中缺少 {file}：{advice}",
    "model.vae: {problem}; or give a folder or a file": "model.vae：{problem}；或指定資料夾或檔案",
    "model.vae: {name} has no VAE in diffusers layout: give {name}/FILE.safetensors; or give a folder or a file": (
        "model.vae：{name} 沒有 diffusers 格式的 VAE：請指定 {name}/FILE.safetensors，或資料夾或檔案"
    ),
    "is of class {kind}, and only {own} is read": "的類別是 {kind}，只讀 {own}",
    "makes latents of {count} channels, and base {base} takes {into}": (
        "的潛在表示有 {count} 個通道，基礎模型 {base} 要 {into} 個"
    ),
    "makes latents of another size than those of base {base}": "的潛在表示大小與基礎模型 {base} 的不同",
    "has scaling factor {one}, and base {base} has {two}": "的縮放係數為 {one}，基礎模型 {base} 的是 {two}",
    "set model.text_encoders to a folder with clip_l.safetensors and clip_g.safetensors, or to a base that has them (a "
    "file, a folder in diffusers layout, or a hub id": (
        "請把 model.text_encoders 設為有 clip_l.safetensors 與 clip_g.safetensors 的資料夾，"
        "或有它們的基礎模型（檔案、diffusers 格式的資料夾或 hub 識別名"
    ),
}
_FILES = {
    "{file}: this is {kind}": "{file}：這是 {kind}",
    "a pickle (.ckpt/.pt): it can run code when opened; convert it once: lorakit convert FILE": (
        "pickle（.ckpt/.pt），開啟時可能執行程式碼；請轉換一次：lorakit convert FILE"
    ),
    "a GGUF file, not safetensors": "GGUF 檔，不是 safetensors",
    "a Git LFS pointer, not the file itself: fetch it with git lfs pull": (
        "Git LFS 指標，不是檔案本身：請用 git lfs pull 取得"
    ),
    "a web page, not a model: the download failed": "網頁，不是模型：下載失敗了",
    "a picture, not a model": "圖片，不是模型",
    "a database, as Draw Things keeps its models: give the file that was imported there": (
        "資料庫（Draw Things 存放模型的方式）：請指定當初匯入的檔案"
    ),
    "SDXL's refiner, which no adapter is trained on: give the SDXL base": (
        " SDXL 的 refiner，不能訓練 adapter：請指定 SDXL base"
    ),
    "base {link} is a part of a model: give {name} for the whole model": (
        "{link} 只是模型的一部分：請指定 {name}（完整的模型）"
    ),
    "T5 and no tokenizer for it on this machine, and T5's": "T5，但這台電腦上沒有它的分詞器；T5 的分詞器",
    "set model.tokenizer to a folder with tokenizer_3/tokenizer.json in it, or to that of ComfyUI; or set model.t5 = "
    "false, which leaves T5 out": (
        "請把 model.tokenizer 設為含 tokenizer_3/tokenizer.json 的資料夾，或 ComfyUI 的資料夾；"
        "或設 model.t5 = false，不使用 T5"
    ),
    "{counts}; no rule for {name}{more}": "{counts}；不認得 {name}{more}",
    "{counts}; {why}: {module}{more}": "{counts}；{why}：{module}{more}",
    "{description}; it predicts {kind}, {why}": "{description}；預測 {kind}，{why}",
    "it holds {count} .safetensors files{pickles}": "裡面有 {count} 個 .safetensors 檔{pickles}",
    "the diffusers format cannot carry this DoRA: PEFT's magnitude is one number per output row, this one has one per "
    "input column, which is what web UIs read; export it as kohya": (
        "diffusers 格式裝不下這個 DoRA（方向與 PEFT 的不同）；請匯出成 kohya"
    ),
    "the PEFT format cannot carry this DoRA: PEFT's magnitude is one number per output row, this one has one per "
    "input column, which is what web UIs read; export it as kohya": (
        "PEFT 格式裝不下這個 DoRA（方向與 PEFT 的不同）；請匯出成 kohya"
    ),
    "the diffusers format cannot carry {kind}: diffusers reads plain LoRA only; export it as kohya or peft, or make "
    "plain LoRA of it with: lorakit resize FILE --energy 1 --to diffusers": (
        "diffusers 格式裝不下 {kind}：diffusers 只讀一般的 LoRA；請匯出成 kohya 或 peft，"
        "或以 lorakit resize FILE --energy 1 --to diffusers 變成一般的 LoRA"
    ),
    "the PEFT format cannot carry {name}: PEFT cuts a LoKr in another way; export it as kohya": (
        "PEFT 格式裝不下 {name}：PEFT 以另一種方式切分 LoKr；請匯出成 kohya"
    ),
    "{path}: cannot be written ({reason}); nothing there was changed": (
        "{path}：無法寫入（{reason}）；那裡沒有任何更動"
    ),
    "{path}: exists and is not a PEFT folder; choose another name": "{path}：已存在且不是 PEFT 資料夾；請換一個名稱",
    "the adapter has no effect on its output: {share} % is no more than rounding": (
        "adapter 對輸出沒有作用：{share} % 不超過捨入誤差"
    ),
    "{problem}; raise optimizer.learning_rate or the number of steps": (
        "{problem}；請提高 optimizer.learning_rate 或增加步數"
    ),
    "{path}: its names are PEFT's, and {peft_config}, which has its alpha, is not beside it: put the two together, "
    "{where}": "{path}：名稱是 PEFT 的，但旁邊沒有含 alpha 的 {peft_config}：請放在一起，{where}",
    "{folder}: has {peft_config} and no {peft_model}: the weights are missing": (
        "{folder}：有 {peft_config}，但沒有 {peft_model}：缺少權重"
    ),
    "{path}: neither a PEFT folder nor a base model (no model_index.json); {holds}": (
        "{path}：不是 PEFT 資料夾，也不是基礎模型（沒有 model_index.json）；{holds}"
    ),
    "the kohya format cannot carry this adapter: it has q, k and v of Stable Diffusion 3's attention in one layer, "
    "which only LoRA can be put into; set output.formats = ['diffusers'] or ['peft']": (
        "kohya 格式裝不下這個 adapter：它把 Stable Diffusion 3 的 q、k、v 放在同一層，只有 LoRA 能如此；"
        "請設 output.formats = ['diffusers'] 或 ['peft']"
    ),
    "a zip archive: unpack it and give the file in it": "zip 壓縮檔：請解壓縮並指定其中的檔案",
    "cut off: {size} of {end} bytes are there ({value} %): download it again": (
        "檔案不完整：{end} 位元組中只有 {size}（{value} %）：請重新下載"
    ),
    "damaged: {size} bytes follow its last tensor": "檔案損壞：最後一個張量之後還有 {size} 位元組",
    "damaged: its safetensors header does not parse": "檔案損壞：safetensors 檔頭無法解讀",
    "{header}: became shorter while it was read: start again": "{header}：讀取途中變短了：請重新開始",
    "{header}: {name} is in {dtype}, which cannot be read here": "{header}：{name} 的格式 {dtype} 無法在這裡讀取",
    "{name} lacks its {component} ({prefixes}*): get the whole checkpoint{hint}": (
        "{name} 缺少 {component}（{prefixes}*）：請取得完整的模型{hint}"
    ),
    ", or give one by model.vae (--vae)": "，或以 model.vae（--vae）指定",
    "{name} lacks its text encoder (cond_stage_model.*, conditioner.*): get the whole checkpoint": (
        "{name} 缺少文字編碼器（cond_stage_model.*, conditioner.*）：請取得完整的模型"
    ),
    "{name} has {prefix}{key} in {dtype}, a quantization not read here: get it in fp16": (
        "{name} 的 {prefix}{key} 是 {dtype}，無法讀取這種量化：請改用 fp16 的檔案"
    ),
    "{file} lacks {component}.{block}{missing}, which its other blocks have: get the whole checkpoint": (
        "{file} 缺少 {component}.{block}{missing}，其他區塊都有：請取得完整的模型檔"
    ),
    "{file} lacks {component}.{like}: get the whole checkpoint": "{file} 缺少 {component}.{like}：請取得完整的模型",
    "{source} lacks text_encoder_3.shared.weight: get the whole checkpoint": (
        "{source} 缺少 text_encoder_3.shared.weight：請取得完整的模型"
    ),
    "{file} has {prefix}{name} in {rows}: get the whole checkpoint": (
        "{file} 的 {prefix}{name} 有 {rows}：請取得完整的模型"
    ),
    "{shape} rows, which are not {count} equal shares": "{shape} 列，無法平分為 {count} 份",
    "{name} is {what}": "{name} 是{what}",
    "{name} is {what}; in one file lorakit reads {titles}": "{name} 是{what}；單一檔案時 lorakit 能讀 {titles}",
    "an unCLIP model, which draws from pictures": " unCLIP 模型，它依圖片作圖",
    "trained with EDM's noise (Playground, CosXL), which lorakit does not do": (
        "以 EDM 的雜訊訓練的（Playground、CosXL），lorakit 不支援"
    ),
    "{key} has a shape that no such model has: get the whole checkpoint": (
        "{key} 的形狀不屬於這種模型：請取得完整的模型"
    ),
    "{key} is missing: get the whole checkpoint": "缺少 {key}：請取得完整的模型",
    "{index}: lists {label}, which is no name of a file beside it: get the base again": (
        "{index}：列出的 {label} 不是旁邊檔案的名稱：請重新取得基礎模型"
    ),
    "memory.device = {device}: torch {version} finds no such device here; `lorakit doctor` says why, memory.device = "
    "'auto' takes what there is": (
        "memory.device = {device}：torch {version} 在這裡找不到這種裝置；設為 'auto' 會採用現有的裝置"
    ),
}

MODELS = {**_WHAT, **_HUB, **_FILES}
