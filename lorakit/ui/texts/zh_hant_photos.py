"""繁體中文：資料夾、說明文字與提示詞的各種訊息；見 `zh_hant_sentences.py`。"""

PHOTOS = {
    "nothing": "什麼都沒有",
    "{names} and {count} more": "{names} 等，另有 {count} 個",
    "{name} ({detail})": "{name}（{detail}）",
    "{count} without an ending": "{count} 個沒有副檔名",
    "{count} in {name}/ (only one level of subfolders is read)": "{name}/ 中有 {count} 張（只讀取一層子資料夾）",
    "{file}: no photo of this name came with it": "{file}：沒有一起上傳同名的照片",
    "data.exclude: no photo is called {name}": "data.exclude：沒有名為 {name} 的照片",
    "data.edits: no photo is called {name}": "data.edits：沒有名為 {name} 的照片",
    "turned or cropped by data.edits: {names}": "依 data.edits 旋轉或裁切：{names}",
    "data.more_folders: {folder} has {name} already; give another name": (
        "data.more_folders：{folder} 裡已有 {name}；請換一個名稱"
    ),
    "data.more_folders.{name}: the name must be one of a folder, such as '3_sks cat'": (
        "data.more_folders.{name}：名稱必須能當資料夾名稱，例如 '3_sks cat'"
    ),
    "data.more_folders.{name}: give the path of a folder": "data.more_folders.{name}：請給資料夾的路徑",
    "data.more_folders needs data.concepts = 'folders' (each its own subject) or 'one'": (
        "data.more_folders 需要 data.concepts = 'folders'（各有各的主體）或 'one'"
    ),
    "left out by data.exclude: {names}": "依 data.exclude 不使用：{names}",
    "data.exclude leaves out every photo of {folder}": "data.exclude 排除了 {folder} 的所有照片",
    "{file}: several files are called {name}, and which belong together is not known; upload one folder at a time": (
        "{file}：有好幾個檔案都叫 {name}，無法得知哪些屬於彼此；請一次上傳一個資料夾"
    ),
    "base {name}: no program reads its texts at another layer: leave model.clip_skip unset": (
        "基礎模型 {name}：沒有程式會在其他層讀取它的文字，請讓 model.clip_skip 留空"
    ),
    "base {name}: model.clip_skip must be {own} (its own) to {layers}, not {skip}": (
        "基礎模型 {name}：model.clip_skip 必須在 {own}（它自己的）到 {layers} 之間，不是 {skip}"
    ),
    "clip skip {skip}: texts are read at layer {layer} of {layers}": (
        "CLIP skip {skip}：在第 {layer} 層（共 {layers} 層）讀取文字"
    ),
    "{count} of {all} texts have more than {room} tokens: they are read in up to {chunks} chunks of {room}, as web UIs "
    "read them": (
        "{all} 段文字中有 {count} 段超過 {room} 個 token：會像網頁介面那樣，以每段 {room} 個分成最多 {chunks} 段讀取"
    ),
    "data.max_tokens = {tokens}: texts are read in chunks of 75: set 75, 150 or 225": (
        "data.max_tokens = {tokens}：文字以每段 75 個 token 讀取，請設為 75、150 或 225"
    ),
    "data.max_tokens = {tokens}: CLIP reads {few} tokens of a text in base {name}, as in other programs: leave it "
    "unset": ("data.max_tokens = {tokens}：在基礎模型 {name} 中，CLIP 與其他程式一樣只讀 75 個 token：請留空"),
    'prompt "{prompt}": {what}': "提示詞「{prompt}」：{what}",
    "{part} is left out: the adapter is named beside the prompt": "{part} 略去：adapter 不寫在提示詞裡",
    "{part} is read as letters: a prompt here stays the same while a picture is drawn": (
        "{part} 只當作文字：這裡的提示詞在作圖過程中不會改變"
    ),
    'CLIP reads {limit} of {count} tokens; cut off: "{cut}"': (
        "CLIP 只讀 {count} 個 token 中的 {limit} 個；截去「{cut}」"
    ),
    "{key}: the quotes around {text} are left out": "{key}：去掉了 {text} 外面的引號",
    "{syntax} is trained as letters": "{syntax} 只當作文字訓練",
    "{count} of {all} texts have what web UIs read as weights or commands and training reads as letters, such as "
    "{example}: {names}": (
        "{all} 段文字中有 {count} 段含有網頁介面會當作權重或指令的寫法，訓練時只當作文字，例如 {example}：{names}"
    ),
    "{count} of {all} texts have a brace that begins or ends no {{a|b}} and is trained as a letter, such as "
    '"{example}": {names}': (
        "{all} 段文字中有 {count} 段的大括號不成 {{a|b}}，訓練時只當作文字，例如「{example}」：{names}"
    ),
    "a brace is trained as a letter": "大括號只當作文字訓練",
    '{file}: not UTF-8, read as {encoding}: "{text}"; if that is wrong, save it as UTF-8': (
        "{file}：不是 UTF-8，以 {encoding} 讀取：「{text}」；若不對，請另存為 UTF-8"
    ),
    "{file}: not text in an encoding that lorakit reads; save it as UTF-8": (
        "{file}：不是 lorakit 能讀的文字編碼；請另存為 UTF-8"
    ),
    "{file}: not read, it has no caption ({keys})": "{file}：沒有讀取，裡面沒有說明文字（{keys}）",
    "not read as captions: {problem}": "沒有當作說明文字讀取：{problem}",
    "{file} line {line}: not JSON ({problem})": "{file} 第 {line} 行：不是 JSON（{problem}）",
    "passed over ({reason}): {names}": "略過（{reason}）：{names}",
    "sample.prompts: {text} is a file: give it with --prompts {path}": (
        "sample.prompts：{text} 是檔案，請在命令列以 --prompts {path} 指定"
    ),
    "each photo is trained at {sides}: as {sizes}; a batch holds one size": (
        "每張照片以 {sides} 訓練：尺寸為 {sizes}；每批只有一種尺寸"
    ),
    "the trigger sks is the name of a rifle too, which Stable Diffusion may draw; ohwx has no such meaning": (
        "觸發詞 sks 也是一種步槍的名稱，Stable Diffusion 可能會畫出來；ohwx 沒有這種意思"
    ),
    'the trigger "{word}" is a word that the base knows well (number {rank} of its vocabulary), so what it draws for '
    "it mixes in; a rare one such as ohwx does not": (
        "觸發詞「{word}」是基礎模型很熟悉的字（詞彙表第 {rank} 個），它原本畫的東西會混進來；ohwx 之類的罕見字則不會"
    ),
    "the bundled base is for trying things and knows no {noun}, only {kinds} and the like; for real pictures give "
    "--base a Stable Diffusion model": (
        "內附的基礎模型只供試用，不認得 {noun}，只認得 {kinds} 之類；"
        "要畫真實的圖，請以 --base 指定 Stable Diffusion 模型"
    ),
    "data.resolution = {side}: base {base} draws pictures of {native} pixels a side; at so different a size what it "
    "draws falls apart": "data.resolution = {side}：基礎模型 {base} 畫的是邊長 {native} 像素的圖；尺寸差這麼多會畫壞",
    "train.min_steps has no effect without train.steps_per_image: leave it out": (
        "沒有 train.steps_per_image，train.min_steps 沒有作用：請刪去"
    ),
    "{folder}: latents cannot be kept there ({reason}); set data.cache = 'memory' or LORAKIT_CACHE": (
        "{folder}：無法在此保存 latents（{reason}）；請設 data.cache = 'memory' 或 LORAKIT_CACHE"
    ),
    "cannot keep class images in {folder}: {reason}; set LORAKIT_CACHE": (
        "無法在 {folder} 保存類別圖片：{reason}；請設 LORAKIT_CACHE"
    ),
    "data.folder_resolutions.{name} = {side}: must be a multiple of 8, and not above data.resolution = {top}": (
        "data.folder_resolutions.{name} = {side}：必須是 8 的倍數，且不大於 data.resolution = {top}"
    ),
    "data.folder_resolutions and data.lower_resolutions are both set: leave one out": (
        "data.folder_resolutions 與 data.lower_resolutions 都設定了：請刪去一個"
    ),
    "data.lower_resolutions = {sides}: each must be below data.resolution = {side}, and stand there once": (
        "data.lower_resolutions = {sides}：每個都必須小於 data.resolution = {side}，且不重複"
    ),
    "data.lower_resolutions: {one} and {two} are one size in this base, whose sides are multiples of {multiple}: leave "
    "one out": (
        "data.lower_resolutions：{one} 與 {two} 在此基礎模型中是同一尺寸（邊長為 {multiple} 的倍數）：請刪去一個"
    ),
    "{key} = {value}: must be a list of whole numbers, such as [512, 384]": (
        "{key} = {value}：必須是整數的清單，例如 [512, 384]"
    ),
    "the class images are your own: nothing is drawn for train.prior_prompts, which are not used": (
        "類別圖片由你自備：不會為 train.prior_prompts 繪製圖片，也不使用這些提示詞"
    ),
    "{count} class images are not trained as the subject and not used: train.prior = 'images' uses them": (
        "{count} 張類別圖片不會當作主體訓練，也沒有使用；train.prior = 'images' 會使用它們"
    ),
    "repeats: an epoch shows each photo of {names}": "重複：每輪顯示各資料夾的照片 {names}",
    "{path} holds pictures of a run of lorakit; give the folder of the photos": (
        "{path} 是 lorakit 的訓練結果；請給照片所在的資料夾"
    ),
    "{path} is inside the folder of photos, where nothing is written; give another --output": (
        "{path} 在照片資料夾裡，那裡不會寫入任何東西；請換一個輸出資料夾"
    ),
    "{folders}: the name of the folder is not {name}; data.concepts = 'folders' trains each folder under its own "
    "name, data.concepts = 'one' trains all photos under data.name": (
        "{folders}：資料夾的名稱不是 {name}；data.concepts = 'folders' 以各資料夾自己的名稱訓練，"
        "data.concepts = 'one' 全部以 data.name 訓練"
    ),
    "data.class_folder has no effect with train.prior = {prior}: choose 'images'": (
        "train.prior = {prior} 時 data.class_folder 沒有作用：請選 'images'"
    ),
    "adapter.new_tokens learns one trigger: data.concepts = 'folders' has one for each folder": (
        "adapter.new_tokens 只學一個觸發詞；data.concepts = 'folders' 則每個資料夾各有一個"
    ),
}
