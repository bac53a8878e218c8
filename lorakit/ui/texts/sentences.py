"""Translate messages for the front end. All other packages write their messages in English.

A table maps each template, e.g. `"{photo}: its caption in {file} is empty"`, to its translation with the same names in
any order. A value that is a message, or a text of the table, is translated too. Other texts stay in English.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.core.messages import Joined, Message


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
            return template.format(**values)
        except (KeyError, IndexError, ValueError):  # the values come from a log file, which may have been changed
            return None
