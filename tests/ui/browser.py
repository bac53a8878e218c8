"""Open the front end in a browser, with less work for the processor than a user's page."""

from collections.abc import Callable
from typing import Any

from waiting import SECONDS

# Poll every three seconds: polls every second use as much processor time as the run.
SLOW_CLOCK = """const every = window.setInterval;
window.setInterval = (act, wait, ...rest) => every(act, wait === 1000 ? 3000 : wait, ...rest);"""


def open_page(
    chromium: Any, address: str, listeners: dict[str, Callable[[Any], object]] | None = None, **options: Any
) -> Any:
    """Open the front end in a new context, and return its page.

    Args:
        listeners: name of an event of the page -> function that is called with it from the first request on.
        options: options of the context.
    """
    context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US"} | options)
    context.add_init_script(SLOW_CLOCK)
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    for name, listener in (listeners or {}).items():
        page.on(name, listener)
    load(page, address)
    return page


def load(page: Any, address: str) -> None:
    """Load the front end in a page and wait until it is ready."""
    page.goto(address)
    page.locator("body[data-ready]").wait_for()
