"""Translate messages for the front end. All other packages write their messages in English.

A table maps each template, e.g. `"{photo}: its caption in {file} is empty"`, to its translation with the same names in
any order. A value that is a message, or a text of the table, is translated too. Other texts stay in English.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

from lorakit.core.messages import Joined, Message

# Characters of scripts without spaces between words; with the quotation marks of simplified Chinese.
WIDE = re.compile("[\u3000-\u30ff\u3400-\u9fff\uff00-\uff60]")
EDGE = re.compile("[\u3000-\u30ff\u3400-\u9fff\uff00-\uff60“”]")


class Sentences:
    """The messages of one language, by their templates.

    Args:
        lines: template -> translation.
        joints: separator between joined messages -> separator in the language.
    """

    def __init__(self, lines: Mapping[str, str], joints: Mapping[str, str]):
        self.lines, self.joints = lines, joints

    def translated(self, text: str) -> str | None:
        """Translate a message by its template, or a plain text as a whole. Return None if the table lacks it."""
        if isinstance(text, Joined):
            joint = self.joints.get(text.template, text.template)
            return joint.join(self.translated(part) or part for part in text.parts)
        if not isinstance(text, Message):
            return self.lines.get(text)
        template = self.lines.get(text.template)
        if template is None or not text.values:
            return template
        values = {name: self.translated(str(value)) or value for name, value in text.values.items()}
        try:
            return fill(template, values)
        except (KeyError, IndexError, ValueError):  # the values come from a log file, which may have been changed
            return None


def fill(template: str, values: Mapping[str, str | float]) -> str:
    """Format a template. A space around a name is dropped where it would separate two characters of such a script."""
    text = ""
    for literal, name, spec, conversion in string.Formatter().parse(template):
        text = meet(text, literal)
        if name is not None:
            field = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            text = meet(text, field.format(**values))
    return text


def meet(before: str, after: str) -> str:
    """Two parts of a text, without the space between two characters of a script that has none."""
    if before.endswith(" ") and _touch(before[-2:-1], after[:1]):
        return before[:-1] + after
    if after.startswith(" ") and _touch(before[-1:], after[1:2]):
        return before + after[1:]
    return before + after


def _touch(one: str, other: str) -> bool:
    return bool((WIDE.match(one) and EDGE.match(other)) or (EDGE.match(one) and WIDE.match(other)))
