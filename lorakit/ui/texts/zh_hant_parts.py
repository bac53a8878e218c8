"""繁體中文：數量、時間，以及句子的各個部分；見 `zh_hant_sentences.py`。"""

_COUNTS = {
    "step": "{count} 步",
    "epoch": "{count} 輪",
    "batch": "{count} 批",
    "photo": "{count} 張照片",
    "block": "{count} 個區塊",
    "thread": "{count} 個執行緒",
    "process": "{count} 個程序",
}
_PLURALS = {"batch": "batches", "process": "processes"}
# -- 計畫 plan.py, plan_lines.py, memory_estimate.py
_PLAN = {
    "{part} {count} modules ({weights} weights)": "{part} {count} 個模組（{weights} 個權重）",
    "base {size}": "基礎模型 {size}",
    "adapter and optimizer {size}": "adapter 與最佳化器 {size}",
    "model and optimizer {size}": "模型與最佳化器 {size}",
    "activations {size}": "中間值 {size}",
    "runtime {size}": "執行環境 {size}",
    "memory: about {total} on {device} ({parts}); {encoding} to encode the photos, {samples} to draw samples": (
        "記憶體：{device} 上約 {total}（{parts}）；編碼照片時 {encoding}，畫樣張時 {samples}"
    ),
    "time: about {time} (estimate)": "時間：約 {time}（估計）",
    "{time}, for the {left} left of {all}": "{time}，剩 {left}（共 {all} 步）",
    "{host}, of {ram}{way}": "{host}，共有 {ram}{way}",
    "; that is much: keep them smaller with memory.base_storage": "；偏多，可用 memory.base_storage 讓權重更小",
    "limit: {blocks} of the UNet computed again in the backward pass, for {limit} GiB": (
        "上限：UNet 的 {blocks} 在反向傳遞時重新計算，以符合 {limit} GiB"
    ),
    "prior: {prior}": "先驗：{prior}",
    "note: fewer than {few} steps teach little (the bundled base needed 200 for 16 pictures, 400 for 5 photos); make "
    "the run longer": (
        "請注意：少於 {few} 步學不到多少（內附的基礎模型學 16 張圖要 200 步，5 張照片要 400 步）；請加長訓練"
    ),
    "texts: all are filled up to {tokens} tokens, as the longest needs; a pass of the UNet computes {share} more than "
    "with {short}; data.max_tokens = 75 would cut them": (
        "文字：全部補到 {tokens} 個 token，配合最長的一段；UNet 每次計算比 {short} 個多 {share}；"
        "data.max_tokens = 75 會截短它們"
    ),
    "model: the base's own weights are trained at the rate {rate}{clip}; written: {outputs}": (
        "模型：以學習率 {rate}{clip} 訓練基礎模型自己的權重；寫出：{outputs}"
    ),
    "{count} class images of your own, none is drawn": "使用你自備的 {count} 張類別圖片，不另外繪製",
    "the base itself, asked in each step, which takes about twice as long": "每一步都問基礎模型本身，時間約為兩倍",
    '{count} class images, drawn by the base as "{text}"': "{count} 張類別圖片，由基礎模型依「{text}」",
    ", and for {count} other prompts,": "與另外 {count} 則提示詞",
    "{images}{more} and kept for other runs": "{images}{more} 繪製，並留給其他訓練",
    "{photos} x {each} each = {steps}{size}{at}{floor}": "{photos} × 每張 {each} = {steps}{size}{at}{floor}",
    "{epochs} x {batches} of {photos}{at}{accumulated} = {steps}{trained}": (
        "{epochs} × {batches}（{photos}{at}）{accumulated} = {steps}{trained}"
    ),
    "{steps}{size}, each of {photos} seen {times} times{at}": "{steps}{size}；{photos}，每張 {times} 次{at}",
    " of {count} photos": "，每步 {count} 張照片",
    " at {count} resolutions": "，{count} 種解析度",
    " at each of {count} resolutions": "，{count} 種解析度各如此",
    ", raised to train.min_steps = {steps}": "，提高到 train.min_steps = {steps}",
    " / {count} accumulated": " / 累積 {count} 批",
    " ({epochs} epochs)": "（實際 {epochs} 輪）",
    "{low} to {high}": "{low} 到 {high}",
    "learning rate: {rate}, {rates}": "學習率：{rate}，{rates}",
    "text encoder {rate}": "文字編碼器 {rate}",
    "text encoder 2 {rate}": "第二個文字編碼器 {rate}",
    "; each weight's gradient is clipped to the norm {norm} by itself": "；每個權重的梯度各自裁剪到 {norm}",
    "{ways}, or {last}": "{ways}，或 {last}",
    "a lower memory.limit_gib (now {gib})": "調低 memory.limit_gib（目前 {gib}）",
    "a lower data.resolution": "調低 data.resolution",
    "a lower data.resolution (now {side})": "調低 data.resolution（目前 {side}）",
    "train.batch_size = 1 with train.gradient_accumulation_steps = {pictures}": (
        "train.batch_size = 1 並設 train.gradient_accumulation_steps = {pictures}"
    ),
    "for a base of the family {family}; --preset chooses another": "適合 {family} 系列的基礎模型；可另選預設組合",
    "train.init_from: {path}: this is {kind}": "train.init_from：{path}：這是 {kind}",
    "memory.attention = 'xformers' needs xformers; {hint}": "memory.attention = 'xformers' 需要 xformers；{hint}",
    "install it with: {command}": "安裝指令：{command}",
    "there is none for {platform}": "這個系統（{platform}）沒有",
}
# -- 設定 config/
_CONFIG = {
    "{names} are set": "設定了 {names}",
    "none is set": "一個都沒設",
    "set exactly one of {options}: {detail}": "{options} 只能設定一個：{detail}",
    " (did you mean {name}?)": "（是不是 {name}？）",
    "unknown section [{section}]{hint}": "沒有 [{section}]{hint} 這個區段",
    "unknown option {key}{hint}": "沒有 {key}{hint} 這個選項",
    "unknown preset {preset}{hint}; presets: {names}": "沒有 {preset}{hint} 這個預設組合；可用的有：{names}",
    "adapter.method = {method}: choose one of {names}{hint}": "adapter.method = {method}：請從 {names}{hint} 中選一個",
    "{path}: not valid TOML: {problem}{hint}": "{path}：不是有效的 TOML：{problem}{hint}",
    "{path} is no preset: presets of lorakit are TOML files (.toml)": (
        "{path} 不是預設組合：預設組合是 TOML 檔（.toml）"
    ),
    "{file} does not exist": "{file} 不存在",
    "{file} cannot be read: {problem}": "{file} 無法讀取：{problem}",
    "{key} = {value}: {single_quotes}": "{key} = {value}：{single_quotes}",
    r"write a path of Windows in single quotes, as in folder = 'C:\Users\me\photos'": (
        r"Windows 路徑請用單引號，例如 folder = 'C:\Users\me\photos'"
    ),
    "{key} = {value}: choose from {choices}{more}{hint}": "{key} = {value}：請從 {choices}{more}{hint} 中選擇",
    "{key} = {value}: choose one of {choices}{more}{hint}": "{key} = {value}：請從 {choices}{more}{hint} 中選一個",
    " or write module:Class": "（或寫成 module:Class）",
    " or {example}": " 或 {example}",
    "{key} = {value}: must be {kind}{more}": "{key} = {value}：必須是 {kind}{more}",
    "a whole number": "整數",
    "a number": "數字",
    "true or false": "true 或 false",
    "text": "文字",
    ", or several as a list, [768, 512]": "；多個則寫成清單 [768, 512]",
    "{key} = {value}: must be {bounds}": "{key} = {value}：必須{bounds}",
    "between {low} and {high}": "介於 {low} 與 {high} 之間",
    "above {low}": "大於 {low}",
    "{low} or more": "大於或等於 {low}",
    "a finite number": "是有限的數字",
    "{key} = {value}: the number is too large": "{key} = {value}：數字太大",
    "a value of type {name} that is too long to show": "{name} 型別的值，太長而不顯示",
    "{key} = {value}: not UTF-8; {way}": "{key} = {value}：不是 UTF-8；{way}",
    "write it in UTF-8, or rename the file or folder; if the name is right, set PYTHONUTF8=1": (
        "請以 UTF-8 書寫，或替檔案或資料夾改名；若名稱正確，請設 PYTHONUTF8=1"
    ),
    "data.edits.{name} = {value}: write {grammar}": "data.edits.{name} = {value}：請寫成 {grammar}",
    "{problem}; start one from its weights with: {command}": "{problem}；要從它的權重開始新的訓練：{command}",
    "sample.prompts: {text}: --{letter} is none of --{settings}": (
        "sample.prompts：{text}：--{letter} 不在 --{settings} 之中"
    ),
    "sample.prompts: {text}: --{letter} must be {of_eight}between {low} and {high}": (
        "sample.prompts：{text}：--{letter} 必須是介於 {low} 與 {high} 之間的{of_eight}數值"
    ),
    "a multiple of 8 ": " 8 的倍數的",
    "--prompts {path}: no such file": "--prompts {path}：沒有這個檔案",
    "--prompts {path}: cannot be read: {reason}": "--prompts {path}：無法讀取：{reason}",
    "--prompts {path}: has no prompt; write one a line": "--prompts {path}：沒有提示詞；請每行寫一則",
    "it is no text in UTF-8": "不是 UTF-8 的文字",
    "{name} = {side}: must be a multiple of 8": "{name} = {side}：必須是 8 的倍數",
    "optimizer.warmup_steps = {warmup}: the run has {steps}, so the learning rate rises to the end and comes to "
    "{share} of optimizer.learning_rate": (
        "optimizer.warmup_steps = {warmup}：這次執行只有 {steps}，學習率會一路上升到結束，"
        "只到 optimizer.learning_rate 的 {share}"
    ),
    "{where}: {module} cannot be imported: {reason}": "{where}：{module} 無法匯入：{reason}",
    "{where}: {module} has no {attribute}": "{where}：{module} 沒有 {attribute}",
    "{where}: {attribute} is not a torch.optim.Optimizer": "{where}：{attribute} 不是 torch.optim.Optimizer",
    "{where}: {attribute} computes the loss several times a step: choose another": (
        "{where}：{attribute} 每一步要計算多次損失，請換一個"
    ),
    "output.trackers = {name} needs {package}; install it with: {package_2}": (
        "output.trackers = {name} 需要 {package}，安裝指令：{package_2}"
    ),
    "adapter.method = {method} trains the base's own weights": "adapter.method = {method} 訓練基礎模型自己的權重",
    "{own}: memory.{option} is for frozen ones, leave it out": "{own}：memory.{option} 只用於凍結的權重，請拿掉",
    "{own}: memory.compile is for an adapter's blocks, set it to false": (
        "{own}：memory.compile 只用於 adapter 的區塊，請設為 false"
    ),
    "{own}, which float16 is too coarse for: set memory.mixed_precision to 'bf16' or 'fp32'": (
        "{own}，float16 不夠精細：請把 memory.mixed_precision 設為 'bf16' 或 'fp32'"
    ),
    "{own}: train.prior = 'teacher' would need the base once more, choose 'images', as DreamBooth does": (
        "{own}：train.prior = 'teacher' 需要另一份基礎模型，請像 DreamBooth 一樣選 'images'"
    ),
    "{own}: train.ema_decay needs memory.mixed_precision = 'fp32', as an average in bf16 would stand still": (
        "{own}：train.ema_decay 需要 memory.mixed_precision = 'fp32'，bf16 的平均不會移動"
    ),
    "{own} one by one, which optimizer.name = {name} cannot: choose one of {optimizers}": (
        "{own}，而且逐一更新，optimizer.name = {name} 做不到：請從 {optimizers} 中選一個"
    ),
}
# -- 照片與文字 data/
_PHOTOS = {
    "smaller than the size they are trained at": "比訓練的尺寸小",
    "lose much to the crop; crop them yourself to choose what stays": "會被裁掉很多；請自行裁切，決定留下什麼",
    "look blurred at the size they are trained at": "以訓練的尺寸看來模糊",
    "drawn by lorakit: it teaches what a model draws already": "是 lorakit 畫的圖，只會教模型它本來就會畫的東西",
    "links to what is not there; not read": "連結指向不存在的東西；不讀取",
    "links to a folder above them; not followed": "連結指向上層資料夾；不跟隨",
    "links out of the folder of photos; not followed, copy the files into it": (
        "連結指向照片資料夾之外；不跟隨，請把檔案複製進來"
    ),
    "cannot be opened: no file and no folder": "無法開啟：既不是檔案也不是資料夾",
    "{what}: trained at {sizes}; a batch holds one size": "{what}：以 {sizes} 訓練；每批只有一種尺寸",
    "mixed sizes": "尺寸不一",
    "mixed aspect ratios": "長寬比不一",
    "every photo": "每張照片",
    "{names}: each": "{names} 各張",
    'no captions: {photos} is trained as "{prompt}"{why}': "沒有說明文字：{photos}都以「{prompt}」訓練{why}",
    "; a prompt that goes on after it, with a place say, may then show little of what is learned: write a caption for "
    "each photo that names its scene": (
        "；提示詞若再接上別的字（例如地點），學到的東西可能出不來：請為每張照片寫一則說明，寫出它的場景"
    ),
    "{count} of {all} photos have no caption": "{all} 張照片中有 {count} 張沒有說明文字",
    '{photos} and are trained as "{prompt}": {names}': "{photos}，以「{prompt}」訓練：{names}",
    "{count} of {all} captions are without the trigger {trigger}": "{all} 則說明中有 {count} 則沒有觸發詞 {trigger}",
    '{captions}; "{name}, " is put in front: {names}': "{captions}；會在前面加上「{name}, 」：{names}",
    "its text has {tokens} tokens, {limit} fit": "文字有 {tokens} 個 token，最多 {limit} 個",
    '{photo}: {fit}; cut off: "{cut}"': "{photo}：{fit}；被截去：「{cut}」",
    "{count} of {all} caption files have several lines: {effect}{option}": (
        "{all} 個說明檔中有 {count} 個不只一行：{effect}{option}"
    ),
    "{count} captions, of which one is drawn each time": "共 {count} 則說明，每次抽一則",
    "one text each": "各讀成一段文字",
    "; with data.caption_lines = true each line is a caption": "；data.caption_lines = true 時每行各是一則說明",
    'data.name = "{name}" is one word: give a rare word and what it is, such as "sks dog"': (
        "data.name =「{name}」只有一個詞：請給一個罕見詞加上它是什麼，例如「sks dog」"
    ),
    "{names}; and {count} more": "{names}；另有 {count} 個",
    "HEIC needs pillow-heif; {hint}": "HEIC 需要 pillow-heif；{hint}",
    "validation: {count} of {all} photos are kept back and never trained on": (
        "驗證：{all} 張照片中保留 {count} 張，不用於訓練"
    ),
    "validation: fewer than {count} photos, none is kept back; it looks at training photos": (
        "驗證：照片少於 {count} 張，不保留；以訓練照片驗證"
    ),
    "validation: no photo is kept back (train.holdout = 0); it looks at training photos": (
        "驗證：不保留照片（train.holdout = 0）；以訓練照片驗證"
    ),
    "latents: {hits} hits, {encoded} encoded{of}, kept in {folder}{suffix}": (
        "latents：{hits} 個已有，{encoded} 個新編碼{of}，存於 {folder}{suffix}"
    ),
    "latents: {encoded} encoded{of}": "latents：{encoded} 個新編碼{of}",
    " ({count} photos{variants}{sizes})": "（{count} 張照片{variants}{sizes}）",
    " with their variants": "與其變化",
    "; {count} on disk were damaged and are encoded again": "；磁碟上有 {count} 個已損壞，重新編碼",
    "folder {path} does not exist{hint}": "資料夾 {path} 不存在{hint}",
    "{folder}/: {problem}": "{folder}/：{problem}",
    "{folder}/: no class images in it": "{folder}/：裡面沒有類別圖片",
    "data.folder_resolutions: no photo is in a folder {name}/{hint}": (
        "data.folder_resolutions：資料夾 {name}/{hint} 裡沒有照片"
    ),
    "data.more_folders: {name}/ would not be trained ({why})": "data.more_folders：{name}/ 不會用於訓練（{why}）",
    "data.class_folder is set": "已設定 data.class_folder",
    "a run of lorakit, not photos": "lorakit 的訓練結果，不是照片",
    "0 repeats": "重複 0 次",
    "class images; name their folder in data.class_folder": "類別圖片；請以 data.class_folder 指定它們的資料夾",
    "{count} class images are no photos of the subject": "{count} 張類別圖片不是主體的照片",
    "{source}: no row of it has a picture and a text": "{source}：沒有一列同時有圖片與文字",
    "cannot be unpacked ({reason})": "無法解壓縮（{reason}）",
    "{problem}; unpack it yourself": "{problem}；請自行解壓縮",
    "locked by a password": "有密碼",
    "damaged, or not a zip": "已損壞，或不是 zip",
    "more than {count} files or {size} GiB in it; unpack it yourself": (
        "內有超過 {count} 個檔案或 {size} GiB；請自行解壓縮"
    ),
    "no photo came with it": "沒有照片一起上傳",
    "a file of this name is there already": "已經有同名的檔案",
    "{photo}: a caption is a text": "{photo}：說明文字必須是文字",
}

PARTS = {
    **{english: chinese for noun, chinese in _COUNTS.items() for english in (
        f"{{count}} {noun}", f"{{count}} {_PLURALS.get(noun, noun + 's')}"
    )},
    "{seconds} s": "{seconds} 秒",
    "{minutes} min": "{minutes} 分鐘",
    "{hours} h {minutes} min": "{hours} 小時 {minutes} 分鐘",
    "{days} days": "{days} 天",
    "{file}: {problem}": "{file}：{problem}",
    "{name}: {problem}": "{name}：{problem}",
    "{name}: {detail}": "{name}：{detail}",
    "{name}: {path}": "{name}：{path}",
    **_PLAN,
    **_CONFIG,
    **_PHOTOS,
}  # fmt: skip
