"""Convert zh-Hant.json to zh-Hans.json with OpenCC: `pip install opencc`, then `python scripts/zh_hans.py`."""

import json
import re
from pathlib import Path

TEXTS = Path(__file__).resolve().parents[1] / "lorakit" / "ui" / "texts"
ABOUT = {
    "name": "简体中文",
    "locale": "zh-CN",
    "serves": ["zh-CN", "zh-SG", "zh-MY", "zh-Hans", "zh"],
    "by_machine": True,
    "note": "（简体中文由机器从繁体转换，欢迎指正。）",
}
# Replacements after OpenCC: words that differ in mainland Chinese and that OpenCC keeps, and the quotation marks.
WORDS = """
「=“ 」=” 纪录=记录 预设组合=预设 杂讯=噪声 万用字=通配符 矢量=向量 图片档=图片文件 单档=单文件 说明档=说明文件
模型档=模型文件 空档=空文件 设置档=配置文件 描述档=配置文件 程式=程序
档头=文件头 压缩档=压缩包 套件=软件包 暖身=预热 比特=位 显示内存=显存 主内存=内存 渗漏=泄漏 套用=应用
寻找与取代=查找与替换
取代=替换 取得=获取 品质=质量 遮罩=蒙版 裁切=裁剪 指令=命令 重播=重放 拷贝=复制 追踪=跟踪 识别名=标识 中继数据=元数据
"""


def dump(content: dict[str, dict[str, object]]) -> str:
    """Format the content of a language's file as JSON with one line for each text."""
    parts = []
    for part, texts in content.items():
        lines = [
            f"    {json.dumps([key], ensure_ascii=False)[1:-1]}: {json.dumps(text, ensure_ascii=False)}"
            for key, text in texts.items()
        ]
        parts.append(f'  "{part}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Convert the characters and words of the texts, but not their keys."""
    from opencc import OpenCC

    convert = OpenCC("tw2sp").convert

    def simplified(text: str | list[str]) -> object:
        if isinstance(text, list):
            return [simplified(one) for one in text]
        text = convert(text)
        for pair in WORDS.split():
            text = text.replace(*pair.split("="))
        # A row is 列 in Taiwan and 行 in mainland China. A column is 欄 in Taiwan and 列 in mainland China.
        text = re.sub(r"(?<![队系并排序])列(?![出入表举])", "行", text).replace("栏", "列")
        text = re.sub(r"(?<=[ a-z])档", "文件", text)
        return text

    content = json.loads((TEXTS / "zh-Hant.json").read_text(encoding="utf-8")) | {"about": {}}
    converted = {part: {key: simplified(text) for key, text in lines.items()} for part, lines in content.items()}
    (TEXTS / "zh-Hans.json").write_text(dump(converted | {"about": ABOUT}), encoding="utf-8")


if __name__ == "__main__":
    main()
