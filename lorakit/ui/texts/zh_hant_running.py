"""繁體中文：一次執行從開始到結束所說的話；見 `zh_hant_sentences.py`。"""

RUNNING = {
    "{photo}, held out, comes out worse than by the base (error {loss} above), the trained photos better (the middle "
    "one {middle} below): it shows something else than they do, or its text does not say what it shows": (
        "保留的照片 {photo} 比基礎模型更差（誤差高 {loss}），訓練過的照片較好（居中者低 {middle}）："
        "它拍的與其他照片不同，或文字沒有說出它的內容"
    ),
    "the held-out photos come out worse than by the base (error {loss} above), the trained ones better (the middle one "
    "{middle} below): the run has learned its photos, not what they have in common; train fewer steps, or use more "
    "photos": (
        "保留的照片比基礎模型更差（誤差高 {loss}），訓練過的較好（居中者低 {middle}）："
        "模型學的是這些照片本身，而不是它們的共同點；請減少步數，或增加照片"
    ),
    "the sample {sample} is a copy of {photo}, edge by edge ({match}): the run has learned that photo by heart; "
    "train fewer steps, or use more photos": (
        "樣本圖 {sample} 是照片 {photo} 的翻版（邊緣相符 {match}）：模型把這張照片背了下來；請減少步數，或增加照片"
    ),
    "{photo} taught least: the adapter takes {gain} off the base's error on it, and {middle} off that on the middle "
    "photo; look whether it shows what the others show, and whether its text says what it shows": (
        "{photo} 教得最少：adapter 在它上面只減少基礎模型誤差的 {gain}，居中的照片則減少 {middle}；"
        "請看它拍的是否與其他照片相同，文字是否說出它的內容"
    ),
    "{name} keeps an average of the weights: it is exported, drawn and validated": (
        "{name} 自己保留權重的平均：匯出、作圖與驗證都用它"
    ),
    "train.ema_decay: {name} keeps an average itself: leave it out": "train.ema_decay：{name} 自己有平均，請拿掉",
    "loading the base": "正在載入基礎模型",
    "encoding the photos": "正在編碼照片",
    "drawing the class images": "正在繪製類別圖片",
    "encoding the class images": "正在編碼類別圖片",
    "attaching the adapter": "正在裝上 adapter",
    "its process ended without a word: it was killed, the machine was restarted, or its memory ran out; "
    "Resume goes on from the last checkpoint": (
        "程序無聲無息地結束了：可能被強制終止、電腦重新啟動，或記憶體不足；按「繼續」會從最後一個檢查點接著訓練"
    ),
    "{option} is for a change that is the product of its factors alone, which that of {method} is not; leave it out": (
        "{option} 只適用於純粹由因子相乘而成的變化，{method} 不是：請拿掉"
    ),
    "layers: {count} of rank {rank}, alpha {alpha}, effective scale {scale}": (
        "層：{count} 層的秩 {rank}，alpha {alpha}，實際縮放 {scale}"
    ),
    "rates: {count} layers at {multiple} of the learning rate": "學習率：{count} 層為 {multiple} 倍",
    "{option}: {pattern} has no effect, as later patterns match all of its {count} layers": (
        "{option}：{pattern} 沒有作用，後面的樣式涵蓋了它的 {count} 層"
    ),
    "adapter.ranks leaves out every layer": "adapter.ranks 略去了所有的層",
    "adapter.ranks leaves out the text encoders: leave out adapter.train_text_encoder": (
        "adapter.ranks 略去了文字編碼器：請拿掉 adapter.train_text_encoder"
    ),
    "{option}: put quotes around a pattern with dots, as in {example}": (
        "{option}：有句點的樣式要加引號，例如 {example}"
    ),
    "{option}: at most {count} patterns of at most {length} characters are read": (
        "{option}：最多 {count} 個樣式，每個最多 {length} 個字元"
    ),
    "average: exported, drawn and validated is the average of about the last {count} steps' weights": (
        "平均：匯出、作圖與驗證都用大約最後 {count} 步的平均權重"
    ),
    "train.{name} = {value} is not defined for base {base}, which predicts the flow: leave it at {usual}": (
        "基礎模型 {base} 預測 flow，沒有 train.{name} = {value}：請維持 {usual}"
    ),
    "train.timestep_low must be below train.timestep_high": "train.timestep_low 必須小於 train.timestep_high",
    "train.snr_weighting = 'soft_min' needs train.min_snr_gamma; 5 is usual": (
        "train.snr_weighting = 'soft_min' 需要 train.min_snr_gamma；常用 5"
    ),
    "train.min_snr_gamma has no effect with train.snr_weighting = 'debiased': leave one out": (
        "train.snr_weighting = 'debiased' 時 train.min_snr_gamma 沒有作用：請拿掉一個"
    ),
    "optimizer.{name} needs adapter.train_text_encoder = true or new_tokens": (
        "optimizer.{name} 需要 adapter.train_text_encoder = true 或 new_tokens"
    ),
    "data.keep_tags has no effect without data.shuffle_tags or data.tag_dropout": (
        "沒有 data.shuffle_tags 或 data.tag_dropout 時 data.keep_tags 沒有作用"
    ),
    "optimizer.warmup_steps and optimizer.warmup_ratio are both set: leave one out": (
        "optimizer.warmup_steps 與 optimizer.warmup_ratio 都設定了：請拿掉一個"
    ),
    "optimizer.{name} has no effect without optimizer.lr_scheduler = {schedule}": (
        "optimizer.{name} 只有在 optimizer.lr_scheduler = {schedule} 時才有作用"
    ),
    "optimizer.min_lr_ratio has no effect with a constant rate: choose an optimizer.lr_scheduler": (
        "學習率固定時 optimizer.min_lr_ratio 沒有作用：請選擇其他 optimizer.lr_scheduler"
    ),
    "sample.prompts: {row}: a table needs a prompt": "sample.prompts：{row}：表格必須有 prompt",
    "sample.prompts: unknown key {key}{hint}": "sample.prompts：沒有 {key} 這個鍵",
    "sample.width and sample.height must be multiples of 8 and 64 or more, or 0": (
        "sample.width 與 sample.height 必須是 64 以上的 8 的倍數，或 0"
    ),
    "{path} is at step {step} already, beyond {end}: give more steps, or go back with --from": (
        "{path} 已在第 {step} 步，超過 {end}：請填入更多步數"
    ),
    "the run is older than {options}: it goes on with the default of each": ("這次訓練早於 {options}：各以預設值繼續"),
    "{key} cannot change from {old} to {new} in a run that goes on: it would be another run": (
        "{key} 不能在繼續訓練時從 {old} 改為 {new}：那會是另一次訓練"
    ),
    "memory: the card has {gib} free, and a step may need more even with every block computed again; "
    "memory.base_storage = 'nf4' or a lower data.resolution makes it smaller": (
        "記憶體：顯示卡有 {gib} 可用，即使每個區塊都重新計算，一步仍可能不夠；"
        "memory.base_storage = 'nf4' 或較低的 data.resolution 會使它變小"
    ),
    "device memory: {free} of {total} GiB are free, and the run stays within them": (
        "裝置記憶體：{total} GiB 中有 {free} GiB 可用，這次執行不會超過"
    ),
    "memory: {count} blocks of the UNet are computed again in the backward pass, for what is free": (
        "記憶體：為了不超過可用的記憶體，反向傳播時重新計算 UNet 的 {count} 個區塊"
    ),
    "cuDNN tries its kernels for each size, because a GTX 16 needs that in fp16": (
        "cuDNN 會為每種尺寸試用核心，因為 GTX 16 在 fp16 下需要如此"
    ),
    "every attention kernel fails its self-test ({problem}): update torch or the driver": (
        "所有注意力核心都沒有通過檢驗（{problem}）：請更新 torch 或驅動程式"
    ),
    "train.deterministic = true: {problem}; set it to false": "train.deterministic = true：{problem}；請設為 false",
    "memory.stream_base: the system does not pin so much of the host's memory, so copies to the card make training "
    "wait; on WSL raise the memory in .wslconfig, or keep the weights smaller with memory.base_storage": (
        "memory.stream_base：系統無法固定這麼多主記憶體，因此複製到顯示卡時訓練必須等待；"
        "在 WSL 上請調高 .wslconfig 的記憶體，或用 memory.base_storage 讓權重變小"
    ),
    "memory.limit_gib chooses the blocks to recompute: leave out memory.gradient_checkpointing": (
        "memory.limit_gib 會自行選擇要重新計算的區塊：請不要設定 memory.gradient_checkpointing"
    ),
    "memory.limit_gib = {limit}: a step takes {size} GiB even if every block is computed again; "
    "raise it, or set {ways}": (
        "memory.limit_gib = {limit}：即使每個區塊都重新計算，一步仍需 {size} GiB；請調高上限，或設定 {ways}"
    ),
    # -- 執行 run_folder.py, train.py, checkpoint.py, data/cache.py, memory.py
    "done and checked": "完成，且已檢驗",
    "{path} is a file; give --output a folder": "{path} 是檔案；請指定資料夾",
    "{path} is not empty and nothing in it is overwritten; give another --output{hint}": (
        "{path} 不是空的，其中的內容不會被覆寫；請換一個資料夾"
    ),
    "cannot write to {path}: {why}; give another --output": "無法寫入 {path}：{why}；請換一個資料夾",
    "all {count} steps are done, the files are written again; --steps trains longer": (
        "全部 {count} 步都已完成，重新寫入檔案；用 --steps 可訓練更久"
    ),
    "it goes on from {checkpoint}": "從 {checkpoint} 繼續",
    "{what} cannot be written ({why}); the run goes on without: make room for it": (
        "無法寫入{what}（{why}）；訓練會繼續，請騰出空間"
    ),
    "{path} was begun by another process just now; give another --output": "{path} 剛被另一個程序使用；請換一個資料夾",
    "{path} has no whole checkpoint: the run starts again from step 0": "{path} 沒有完好的檢查點：從頭開始訓練",
    "set aside, to be deleted when you like: {names}": "已移到一旁，可隨時刪除：{names}",
    "{path} is being trained by process {pid}; stop that first": "{path} 正由程序 {pid} 訓練中；請先停止它",
    "{path} is damaged; the checkpoints beside it are not touched by that": "{path} 已損壞；旁邊的檢查點不受影響",
    "the base holds NaN or infinity in {name}: it is damaged; get the base again": (
        "基礎模型的 {name} 含有 NaN 或無限大：檔案已損壞，請重新取得"
    ),
    "{doing}: not enough memory on the device; cheapest first, set {ways}": (
        "{doing}：裝置的記憶體不足；請依序試試（代價最小的在前）：{ways}"
    ),
    "train.masked_loss: no photo has a mask; put name.mask.png beside name.jpg, or set it to false": (
        "train.masked_loss：沒有照片有遮罩；請把 name.mask.png 放在 name.jpg 旁邊，或設為 false"
    ),
    "{photo}: its mask is black all over, so nothing of it would be learned": (
        "{photo}：遮罩全黑，這張照片什麼也學不到"
    ),
    "{photo}: its latent is not finite; the base's VAE cannot encode this photo": (
        "{photo}：latent 不是有限值；基礎模型的 VAE 無法編碼這張照片"
    ),
    "{folder} knows {words} words where its text encoder has {rows}: {hint}": (
        "{folder} 有 {words} 個詞，文字編碼器卻有 {rows} 個：兩者不相配"
    ),
    "base {path} names a scheduler {name} that diffusers {version} lacks: upgrade diffusers": (
        "基礎模型 {path} 指定的排程器 {name}，diffusers {version} 沒有"
    ),
    "memory.mixed_precision = 'bf16': this card does not compute in bf16; choose 'fp16' or 'fp32'": (
        "memory.mixed_precision = 'bf16'：這張顯示卡不支援 bf16；請選 'fp16' 或 'fp32'"
    ),
    "memory.stream_base = true needs a CUDA card to copy weights to, and this is {device}: set it to false": (
        "memory.stream_base = true 需要 CUDA 顯示卡，這裡是 {device}：請設為 false"
    ),
    "memory.stream_base: the host has no {size} MiB of memory left for the base's weights; close other programs, or "
    "keep the weights smaller with memory.base_storage": (
        "memory.stream_base：主記憶體不足 {size} MiB，放不下基礎模型的權重；"
        "請關閉其他程式，或用 memory.base_storage 讓權重更小"
    ),
    "memory.base_storage = 'w8a8': products in int8 do not work on {device} with torch {version} ({reason}): "
    "take 'int8', which is as small": (
        "memory.base_storage = 'w8a8'：{device} 與 torch {version} 不能做 int8 乘積（{reason}）：請用同樣小的 'int8'"
    ),
    "memory.channels_last = 'on' needs the weights whole: no memory.stream_base, memory.base_storage = 'full'": (
        "memory.channels_last = 'on' 需要完整的權重：不用 memory.stream_base，且 memory.base_storage = 'full'"
    ),
    "memory.channels_last = 'on' needs memory.engine = 'fused' and no memory.compile": (
        "memory.channels_last = 'on' 需要 memory.engine = 'fused'，且不用 memory.compile"
    ),
    "memory.compile needs the weights whole: no memory.stream_base, memory.base_storage = 'full'": (
        "memory.compile 需要完整的權重：不用 memory.stream_base，且 memory.base_storage = 'full'"
    ),
    "memory.compile goes neither with memory.gradient_checkpointing nor with memory.limit_gib": (
        "memory.compile 不能與 memory.gradient_checkpointing 或 memory.limit_gib 併用"
    ),
    "memory.compile compiles fused blocks: set memory.engine = 'fused'": (
        "memory.compile 編譯的是融合後的區塊：請設 memory.engine = 'fused'"
    ),
    "memory.base_storage and memory.stream_base need memory.engine = 'fused'": (
        "memory.base_storage 與 memory.stream_base 需要 memory.engine = 'fused'"
    ),
    "dropout left {count} of {total} layers out of every step, so they change nothing: train longer to reach them": (
        "dropout 讓 {total} 層中的 {count} 層在每一步都被略去，因此沒有作用：訓練久一點就會輪到"
    ),
    "memory.compile needs adapter.dropout = 0: compiled code would draw other numbers": (
        "memory.compile 需要 adapter.dropout = 0：編譯後會抽到不同的隨機數"
    ),
    "memory.compile: a CPU compiles for minutes, and its steps were measured to be no quicker for it": (
        "memory.compile：CPU 要編譯好幾分鐘，而實測之後的每一步並沒有變快"
    ),
    "compiled the UNet's blocks for this batch shape in {seconds} s; the code is stored in {folder} for the next "
    "run": "已在 {seconds} 秒內為這種批次形狀編譯 UNet 的區塊；存放於 {folder}，下次執行會較快",
    "the UNet's blocks are not compiled, training continues without: {problem}": (
        "UNet 的區塊未編譯，訓練照常繼續：{problem}"
    ),
    "train.init_from: {problem}": "train.init_from：{problem}",
    "{method} in the {format} format is honoured by {programs}; not by {others}": (
        "{format} 格式的 {method}：{programs} 會採用；以下不會：{others}"
    ),
    "optimizer.name = {name} needs a CUDA device: choose 'adamw8bit' or 'adamw'": (
        "optimizer.name = {name} 需要 CUDA 裝置：請選 'adamw8bit' 或 'adamw'"
    ),
    "optimizer.name = {name} has one rate: leave optimizer.text_encoder_learning_rate, "
    "optimizer.loraplus_lr_ratio and optimizer.rates unset": (
        "optimizer.name = {name} 只有一個學習率："
        "optimizer.text_encoder_learning_rate、optimizer.loraplus_lr_ratio、optimizer.rates 請留空"
    ),
    "optimizer.loraplus_lr_ratio is for a factor A that begins at random and a B that begins at 0: {why}; "
    "leave it out": "optimizer.loraplus_lr_ratio 是給隨機開始的 A 與從 0 開始的 B 用的（{why}）：請拿掉",
    "both of them begin from the base": "這裡兩者都從基礎模型開始",
    "{method} has others": "{method} 的因子不同",
    "optimizer: {name} is not known to lorakit; the memory estimate assumes {bytes} bytes of state for each weight": (
        "最佳化器：lorakit 不認得 {name}；記憶體估計假設每個權重的狀態為 {bytes} 位元組"
    ),
    "output.trackers = {name}: the package {package} is not installed": (
        "output.trackers = {name}：套件 {package} 未安裝"
    ),
    "output.notify: there is no command {name} here; {way}": "output.notify：這裡沒有指令 {name}；{way}",
    "output.notify = {value}: {reason}; {way}": "output.notify = {value}：{reason}；{way}",
    "give the address of a server, as https://..., or a command": "請填伺服器的網址，例如 https://...，或一個指令",
    "no address of http:// or https:// without a user's name": "不是不含使用者名稱的 http:// 或 https:// 網址",
    "output.notify: nobody was notified ({reason})": "output.notify：通知沒有送出（{reason}）",
    "no answer within {seconds} s": "{seconds} 秒內沒有回應",
    "{option} cannot be set from a page: leave it out, or {way}": "{option} 不能從頁面設定：請拿掉，或{way}",
    "start the front end with --{name}": "啟動前端時加上 --{name}",
    "output.trackers: {name} does not start: {problem}": "output.trackers：{name} 無法啟動：{problem}",
    "optimizer.name = {name}: the package {package} is not installed": "optimizer.name = {name}：套件 {package} 未安裝",
    "optimizer.name = {name}: a step failed: {why}": "optimizer.name = {name}：執行一步時失敗：{why}",
    "optimizer.args.{argument}: {name} has no such argument; it has {names}": (
        "optimizer.args.{argument}：{name} 沒有這個引數；它有 {names}"
    ),
    "optimizer.args.lr has no effect: set optimizer.learning_rate": (
        "optimizer.args.lr 沒有作用：請設定 optimizer.learning_rate"
    ),
    "optimizer.args: {name} does not take them: {why}": "optimizer.args：{name} 不接受這些引數：{why}",
    "optimizer.args: {name} refuses them: {why}": "optimizer.args：{name} 拒絕這些引數：{why}",
    "optimizer.weight_decay: {name} has no weight decay: leave it out": (
        "optimizer.weight_decay：{name} 沒有權重衰減，請留空"
    ),
    "torch {version} does not see the graphics card: `lorakit doctor` says why": (
        "torch {version} 找不到顯示卡：`lorakit doctor` 會說明原因"
    ),
    "an NVIDIA driver is installed, but torch {version} is built without CUDA: it computes on the CPU, many times "
    "slower; for the card: {command}": (
        "已安裝 NVIDIA 驅動程式，但 torch {version} 不含 CUDA：以 CPU 運算，慢很多倍；使用顯示卡的指令：{command}"
    ),
    "self-check failed for {file}: {causes}": "{file} 未通過自我檢驗：{causes}",
    "{some} of {count} modules there, finite and not zero": "{count} 個模組中有 {some} 個，皆為有限且非零",
    "{some} of {count} modules applied, each as trained": "{count} 個模組中套用了 {some} 個，皆與訓練所得相同",
    "optimizer.learning_rate = {rate}: for {name} it is a factor, {usual} is usual; with so little the adapter hardly "
    "changes": "optimizer.learning_rate = {rate}：對 {name} 而言這是倍率，通常為 {usual}；這麼小，adapter 幾乎不會改變",
    "optimizer.learning_rate = 0 trains nothing: give a rate above 0": (
        "optimizer.learning_rate = 0 什麼也不會訓練：請設為大於 0 的值"
    ),
    "optimizer.text_encoder_learning_rate = 0 trains no text encoder: leave it out, with "
    "adapter.train_text_encoder and adapter.new_tokens": (
        "optimizer.text_encoder_learning_rate = 0 不會訓練文字編碼器：請不要設定它，"
        "也不要設定 adapter.train_text_encoder 與 adapter.new_tokens"
    ),
    "the adapter has no effect: every module is zero; was the learning rate 0?": (
        "adapter 沒有作用：每個模組都是零；學習率是不是 0？"
    ),
    "the file reproduces the trained adapter: effect {effect}, difference {error} of the effect": (
        "檔案重現了訓練所得的 adapter：影響 {effect}，差距為其中的 {error}"
    ),
    # -- 基礎模型
    "base {link} is a link: download the model and give its path, or give a hub id, owner/name": (
        "基礎模型 {link} 是連結：請下載模型並指定其路徑，或指定 hub id（owner/name）"
    ),
    "base {base} is a {name} without {encoder}, as SDXL's refiner is: give the base model instead": (
        "基礎模型 {base} 是沒有 {encoder} 的 {name}，如同 SDXL 的 refiner：請改為指定 base 模型"
    ),
}
