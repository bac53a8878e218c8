"""繁體中文：lorakit 各處所說的話（計畫、照片檢查、設定錯誤……）。英文在左，中文在右；見 `sentences.py`。"""

from lorakit.ui.texts.zh_hant_bases import BASES
from lorakit.ui.texts.zh_hant_captions import CAPTIONS
from lorakit.ui.texts.zh_hant_models import MODELS
from lorakit.ui.texts.zh_hant_parts import PARTS
from lorakit.ui.texts.zh_hant_photos import PHOTOS
from lorakit.ui.texts.zh_hant_running import RUNNING
from lorakit.ui.texts.zh_hant_training import TRAINING

SENTENCES = {
    **BASES,
    **CAPTIONS,
    **PHOTOS,
    " and {count} more": " 等，另有 {count} 個",
    **PARTS,
    **MODELS,
    **TRAINING,
    # -- 計畫 plan.py, families/describe.py
    "base: {name} ({family}, predicts {kind})": "基礎模型：{name}（{family}，預測 {kind}）",
    "from the hub: {source}": "來自 hub：{source}",
    "inpainting model: trained and drawn with the whole picture masked, that is from text alone": (
        "局部重繪模型：訓練與作圖時整張圖都被遮住，也就是只依文字。"
    ),
    "prediction type: {kind}, as model.prediction_type says; the base itself says {own}": (
        "預測類型：{kind}（依 model.prediction_type）；基礎模型自述為 {own}"
    ),
    "prediction type: {kind}, {why}": "預測類型：{kind}，{why}",
    "prediction type: {kind}, {why}; if that is wrong, set model.prediction_type (`lorakit probe` measures it)": (
        "預測類型：{kind}，{why}；若不對，請設定 model.prediction_type（可用 lorakit probe 測量）"
    ),
    "as its key v_pred says": "依檔案中的鍵 v_pred",
    "as nothing in the file says otherwise": "檔案中沒有相反的說明",
    "as its last norm1.bias spreads by {spread}, above 0.09": "因為最後一個 norm1.bias 的離散度 {spread} 大於 0.09",
    "as its last norm1.bias spreads by {spread}, not above 0.09": (
        "因為最後一個 norm1.bias 的離散度 {spread} 不大於 0.09"
    ),
    "photos: {count} to train on, {held} held out for validation": "照片：{count} 張用於訓練，保留 {held} 張作驗證",
    "photos: {count} to train on, none held out": "照片：{count} 張用於訓練，不保留",
    "adapter: {method}, {parts}": "adapter：{method}，{parts}",
    "strength: rank {rank}, alpha {alpha}, effective scale {scale}": (
        "強度：rank {rank}，alpha {alpha}，實際縮放 {scale}"
    ),
    "length: {length}": "長度：{length}",
    "optimizer.lr_decay_ratio = {share}: the warm-up takes {warmup} of {steps} steps, so wsd falls over the rest and "
    "is never constant": (
        "optimizer.lr_decay_ratio = {share}：暖身占 {steps} 步中的 {warmup} 步，wsd 在其餘步數裡一路下降"
    ),
    "host: {size} of memory for the base's weights": "主記憶體：基礎模型的權重占 {size}",
    "time: measured in the first steps": "時間：開始後的前幾步會實測",
    "no photo can be used for training; the table of the check says what is wrong with each": (
        "沒有可用於訓練的照片；「照片」頁列出每一張的問題"
    ),
    "adapter.target_modules = {which} selects no layer of this base": (
        "adapter.target_modules = {which}：這個基礎模型沒有這樣的層"
    ),
    # -- 照片資料夾 data/photo_folder.py
    "no folder of photos given (data.folder)": "尚未指定照片資料夾（data.folder）",
    "{path} is one picture; give the folder it is in: {folder}": "{path} 是一張圖；請指定它所在的資料夾：{folder}",
    "{path} is a file; give a folder of photos": "{path} 是檔案；請指定照片資料夾",
    "0 images in {path}; looked for {kinds}; found {content}": (
        "{path} 中沒有圖片；可用的格式：{kinds}；只找到：{content}"
    ),
    "{file}: cannot be read ({why})": "{file}：無法讀取（{why}）",
    "{file}: cannot be read any more ({why})": "{file}：已無法讀取（{why}）",
    "{file} names files that are not there: {names}": "{file} 提到不存在的檔案：{names}",
    "pictures more than one folder down are not read: {names}": "更深一層資料夾中的圖片不會讀取：{names}",
    "no photo has the name of {names}: not used": "{names} 沒有同名的照片，不會使用",
    "{names}: captions or masks in a folder without photos, not used: put each beside its photo": (
        "{names}：說明文字或遮罩所在的資料夾沒有照片，不會使用：請各自放在照片旁"
    ),
    "{file}: a document in {kind}, not plain text; save it as plain text": (
        "{file}：這是 {kind} 檔，不是純文字；請另存為純文字"
    ),
    "{photo}: its caption in {file} is empty": "{photo}：{file} 中的說明文字是空的",
    "{photo}: {file} and {other} say different things; {used} is used": (
        "{photo}：{file} 與 {other} 內容不同，採用 {used}"
    ),
    "{file} line {line}: not JSON ({why}); each line is one object": (
        "{file} 第 {line} 行：不是 JSON（{why}）；每一行應是一個物件"
    ),
    '{file} line {line}: needs "file_name", the name of a picture beside it': (
        "{file} 第 {line} 行：需要「file_name」，也就是旁邊那張圖的檔名"
    ),
    "{file} line {line}: needs one of {keys}": "{file} 第 {line} 行：需要 {keys} 其中之一",
    "{name}: {file} line {line} says something else than before; not used": (
        "{name}：{file} 第 {line} 行與前面不同，不採用"
    ),
    "not pictures, left alone: {kinds}": "不是圖片，略過：{kinds}",
    "subfolders: {names}": "子資料夾：{names}",
    # -- 圖檔 data/decode.py
    "cannot be read ({why})": "無法讀取（{why}）",
    "empty, 0 bytes; copy it again from where it came": "空檔，0 位元組；請從原處重新複製",
    "damaged or cut off ({why}); copy it again from where it came": "檔案損壞或不完整（{why}）；請從原處重新複製",
    "more than {count} pixels on a side; save it smaller": "一邊超過 {count} 像素；請存成較小的圖",
    "more than {count} megapixels; save it smaller": "超過 {count} 百萬像素；請存成較小的圖",
    "larger than {size} MiB; save it smaller, as jpg or png": "超過 {size} MiB；請存成較小的 jpg 或 png",
    "takes longer than {seconds} s to read; save it again": "讀取超過 {seconds} 秒；請重新儲存",
    "needs more memory than there is; save it smaller": "記憶體不足以讀取；請存成較小的圖",
    "{kind}, whatever its name says; save it as jpg or png": "無論檔名為何，內容是 {kind}；請存成 jpg 或 png",
    "text, not a picture, whatever its name says; remove it or save the picture again": (
        "內容是文字，不是圖片；請移除，或重新儲存這張圖"
    ),
    "not a picture that can be read; save it as jpg or png": "無法讀取的圖片格式；請存成 jpg 或 png",
    "mask is {size}, its photo {other}: make them equal": "遮罩為 {size}，照片為 {other}：兩者必須相同",
    "holds {count} pictures: the first is used": "內含 {count} 張圖：採用第一張",
    "holds {count} pages: the first is used": "內含 {count} 頁：採用第一頁",
    "its colour profile is for {space}, not for this picture: left out": "色彩描述檔屬於 {space}，不適用這張圖：略過",
    "its colour profile is damaged: left out": "色彩描述檔損壞：略過",
    "CMYK without a colour profile: its colours are a guess": "CMYK 而沒有色彩描述檔：顏色只是推測",
    # -- 照片檢查 data/check.py
    "{names}: {cause}": "{names}：{cause}",
    "left or right in its text": "文字中有左右之分",
    "{photo}: its text says left or right, which data.flip makes untrue; set data.flip = false or change the text": (
        "{photo}：文字提到左或右，而 data.flip 會左右翻轉；請設 data.flip = false，或改寫文字"
    ),
    "no caption": "沒有說明文字",
    "caption without the trigger": "說明文字中沒有觸發詞",
    "data.name is empty: say what the photos show, with --subject 'sks toy' or --style 'sks style'": (
        "data.name 是空的，學到的東西將沒有詞可以喚出；請填一個，例如「sks dog」"
    ),
    "{names}: the same file, counted {count} times": "{names}：同一個檔案，會算 {count} 次",
    "same as {photo}": "與 {photo} 相同",
    "{names}: look almost the same": "{names}：幾乎一樣",
    "{count} more lines like the last are in lorakit check --json: {cause}": (
        "還有 {count} 行與上一行相似，見 lorakit check --json：{cause}"
    ),
    "{count} more texts are too long and cut off": "還有 {count} 則文字太長而被截去",
    "{photo}: its text has what is no character: {text}": "{photo}：文字中有不是字元的內容：{text}",
    "grey, beside a photo in colour": "灰階，旁邊有同名彩色照片",
    "{names}: grey, with the name and size of a photo in colour; name.mask.png is read as a mask, "
    "this is trained as a photo": (
        "{names}：灰階，檔名與尺寸同一張彩色照片；name.mask.png 會當成遮罩，這張會當成照片訓練"
    ),
    "almost the same as {photo}": "與 {photo} 幾乎一樣",
    "scaled up {times}x": "放大 {times} 倍",
    "{share} cropped away": "裁掉 {share}",
    "blurred": "模糊",
    "only {photos}: 5 to 20 from different sides and places teach more": (
        "只有 {photos}：5 到 20 張、不同角度與場景的照片能教得更多"
    ),
    "set upright by their EXIF tag: {names}": "已依 EXIF 標籤轉正：{names}",
    "transparent parts are shown on white: {names}": "透明部分以白色為底：{names}",
    "{some} of {count} photos have a mask; train.masked_loss = true uses it": (
        "{count} 張照片中有 {some} 張有遮罩；train.masked_loss = true 才會使用"
    ),
    "data.flip: the subject is learned mirrored too; leave it off where its sides differ": (
        "data.flip：也會學到左右相反的主體；若主體左右不同，請關閉"
    ),
    "{folder}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt)": (
        "{folder}：沒有分詞器（tokenizer.json，或 vocab.json 與 merges.txt）"
    ),
    # -- 設定 config/schema.py, config/option.py
    "[{name}] must be a table, not {value}": "[{name}] 必須是表格，而不是 {value}",
    "{key} = {value}: must be a list of strings": "{key} = {value}：必須是文字清單",
    "{key} = {value}: must be a table, such as {example}": "{key} = {value}：必須是表格，例如 {example}",
    "{key} = {value}: must be a number, a text, true, false, or a list of these": (
        "{key} = {value}：必須是數字、文字、true、false，或由這些組成的清單"
    ),
    "{text}: write it as section.key=value, e.g. train.steps=200": (
        "{text}：請寫成 section.key=value，例如 train.steps=200"
    ),
    "config file {path} does not exist": "設定檔 {path} 不存在",
    "optimizer.text_encoder_learning_rate needs adapter.train_text_encoder = true or new_tokens": (
        "optimizer.text_encoder_learning_rate 需要 adapter.train_text_encoder = true 或 new_tokens"
    ),
    "adapter.new_tokens needs a trigger of letters and digits: begin data.name with one, 'sks dog'": (
        "adapter.new_tokens 需要由字母與數字組成的觸發詞：請讓 data.name 以它開頭，例如「sks dog」"
    ),
    "unknown option {key} with adapter.method = {method}: leave it out": (
        "adapter.method = {method} 沒有 {key} 這個選項：請拿掉"
    ),
    "adapter.method = {method}: this card has no bf16, and float16 is too coarse for a model's own weights: set "
    "memory.mixed_precision = 'fp32'": (
        "adapter.method = {method}：這張顯示卡沒有 bf16，而 float16 對模型自己的權重太粗：請設 "
        "memory.mixed_precision = 'fp32'"
    ),
    "{key} is for the extracted LoRA: add 'adapter' to adapter.outputs": (
        "{key} 是給抽取的 LoRA 用的：請在 adapter.outputs 加上 'adapter'"
    ),
    "adapter.method = {method} changes the base's own weights, and a pipeline in memory stays as it is: give the base "
    "as a folder or a file": (
        "adapter.method = {method} 會改變基礎模型自己的權重，而記憶體中的 pipeline 保持不變：請給出資料夾或檔案"
    ),
    "adapter.outputs: one file does not tell {what} of base {name}, so that no program would read it right: choose "
    "'folder'": ("adapter.outputs：單一檔案說不出基礎模型 {name} 的 {what}，其他程式會讀錯：請選 'folder'"),
    "optimizer.learning_rate = {rate}: for adapter.method = {method} {usual} is usual; at so much a model forgets what "
    "it knew": (
        "optimizer.learning_rate = {rate}：adapter.method = {method} 通常用 {usual}；這麼高，模型會忘記原本會的"
    ),
    "train.init_from makes no sense with adapter.method = {method}, which begins from the base": (
        "train.init_from 不能與 adapter.method = {method} 並用，因為它從基礎模型開始"
    ),
    "the adapter to start from is for {theirs}, this base is {family}": (
        "起始 adapter 是給 {theirs} 的，這個基礎模型是 {family}"
    ),
    "the adapter to start from is {theirs}: set adapter.method = {method}": (
        "起始 adapter 是 {theirs}：請設 adapter.method = {method}"
    ),
    "train.{name} has no effect with train.prior = 'none': choose 'images' or 'teacher'": (
        "train.prior = 'none' 時 train.{name} 沒有作用：請選 'images' 或 'teacher'"
    ),
    "train.prior_prompts: {prompt} has the trigger {trigger}, which is to be learned": (
        "train.prior_prompts：{prompt} 含有要學的觸發詞 {trigger}"
    ),
    "train.{name} has no effect with train.prior = {prior}: choose 'images'": (
        "train.prior = {prior} 時 train.{name} 沒有作用：請選 'images'"
    ),
    "data.variants > 1 needs data.flip, data.crop_jitter or data.color_jitter": (
        "data.variants 大於 1 時，需要 data.flip、data.crop_jitter 或 data.color_jitter"
    ),
    "data.flip, data.crop_jitter and data.color_jitter need data.variants of 2 or more": (
        "data.flip、data.crop_jitter 與 data.color_jitter 需要 data.variants 為 2 以上"
    ),
    # -- 檢視與轉換 export/*
    "{path}: its weights are a pickle; convert it once: lorakit convert {file}": (
        "{path}：權重是 pickle；請轉換一次：lorakit convert {file}"
    ),
    "{path}: cannot be read as a JSON object": "{path}：無法讀作 JSON 物件",
    "an adapter": "adapter",
    "lorakit's bundled base": "lorakit 內附的基礎模型",
    "a base that attends to text of width {width}, not {usual}": "文字寬度為 {width} 而非 {usual} 的基礎模型",
    "a whole model (a checkpoint), not an adapter": "完整的模型（checkpoint），不是 adapter",
    "a UNet alone, not an adapter": "單獨的 UNet，不是 adapter",
    "a VAE, not an adapter": "VAE，不是 adapter",
    "a text encoder, not an adapter": "文字編碼器，不是 adapter",
    "a textual-inversion embedding, not an adapter": "詞向量（textual inversion），不是 adapter",
    "a ControlNet, not an adapter": "ControlNet，不是 adapter",
    "not an adapter for Stable Diffusion": "不是 Stable Diffusion 的 adapter",
    "metadata": "依中繼資料",
    "names": "依名稱",
    "its keys": "依其中的鍵",
    "the width of the text it attends to": "依文字的寬度",
    "attends to text of width {width}": "依文字的寬度 {width}",
    "its parts; the UNet attends to text of width {width}": "依其組成；UNet 的文字寬度為 {width}",
    "a guess: nothing in the file tells": "推測：檔案中沒有說明",
    "refuses the file: {why}": "拒絕這個檔案：{why}",
    "reads none of it, as it has no rule for names like {name}": "完全無法讀取，不認得 {name} 這樣的名稱",
    "{file}: not converted after {seconds} s": "{file}：{seconds} 秒後仍未轉換完成",
    "{name}: the download ended with code {code}": "{name}：下載以代碼 {code} 結束",
    "{file}: the conversion ended with code {code}": "{file}：轉換以代碼 {code} 結束",
    # -- 介面 ui/*
    "type the path of a folder or a file": "請輸入資料夾或檔案的路徑",
    "{path}: this path cannot be followed": "{path}：無法解析這個路徑",
    "{path}: hidden files and folders are not opened": "{path}：不會開啟隱藏的檔案與資料夾",
    "{path} is outside of {roots}; start the front end with --root FOLDER to allow it": (
        "{path} 不在允許的範圍 {roots} 之內；啟動介面時加上 --root 資料夾 即可開放"
    ),
    "{photo}: no such photo": "{photo}：沒有這張照片",
    "{name} is no run": "{name} 不是執行紀錄",
    "{name} is no checkpoint": "{name} 不是檢查點",
    "{name} is in the queue already": "{name} 已在佇列中",
    **RUNNING,
}
# 並列的訊息之間的標點。
JOINTS = {", ": "、", "; ": "；", ": ": "：", ". ": "。"}
