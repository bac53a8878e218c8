"""Translate messages for the front end. The other rooms write English and know no language.

A table has a line for each template: `"{photo}: its caption in {file} is empty"`, and the translation with the same
names in any order. A value that is a message itself, or a text of the table, is translated too. What has no line stays
in English.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.core.messages import Joined, Message


class Sentences:
    """The messages of one language, by their templates.

    Args:
        lines: template -> translation.
        joints: what stands between messages in a row -> what stands there in the language.
    """

    def __init__(self, lines: Mapping[str, str], joints: Mapping[str, str]):
        self.lines, self.joints = lines, joints

    def translated(self, text: str) -> str | None:
        """Translate a message by its template, or a text by itself. Return None if the table does not contain it."""
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
        except (KeyError, IndexError, ValueError):  # a log that somebody else wrote
            return None
