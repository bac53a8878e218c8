"""A subclass of Gradio's Blocks that answers each invalid request with a one-line message."""

from __future__ import annotations

import re
import traceback
from collections.abc import Awaitable, Callable

import gradio as gr
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from gradio.blocks import BlockFunction
from gradio.exceptions import Error
from gradio.route_utils import FnIndexInferError

from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.ui.guard import STATUS
from lorakit.ui.widgets import say_for, system_error

NUMBER, TEXT = (int, float), (str,)
NO_EVENT = "there is no such event or endpoint"
EVENT_ROUTE = re.compile("/(run|api|call|call/v2)/[^/]+/?$|/(queue/join|component_server)/?$")
SURROGATE = re.compile("[\ud800-\udfff]")
# Types that the page sends for each kind of component. None is always accepted.
TYPES: dict[type, tuple[type, ...]] = {
    gr.Textbox: TEXT,
    gr.HTML: TEXT,
    gr.Number: NUMBER,
    gr.Slider: NUMBER,
    gr.Checkbox: (bool,),
    gr.CheckboxGroup: (list,),
    gr.Radio: TEXT + NUMBER,
    gr.Dropdown: TEXT + NUMBER,
    gr.File: (dict, list),
}


def fits(component: object, value: object) -> bool:
    """Whether the value has a type that the page sends for this component."""
    types = (list,) if getattr(component, "multiselect", False) else TYPES.get(type(component))
    if value is None or types is None:
        return True
    if isinstance(value, list) and list in types:
        return all(isinstance(one, (str, dict, *NUMBER)) for one in value)
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def encodable(value: object) -> object:
    """The value with each half of a surrogate pair replaced, because UTF-8 has no form for it.

    A browser sends one if a text was cut inside of an emoji.
    """
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [encodable(one) for one in value]
    if isinstance(value, dict):
        return {encodable(key): encodable(one) for key, one in value.items()}
    return value


def _part(value: object, limit: int = 200) -> str:
    """The first line of a text, shortened."""
    return next(iter(str(value).splitlines()), "")[:limit]


class Page(gr.Blocks):  # type: ignore[misc]  # Gradio has no types
    """Blocks that check the types of a request's values, and send the texts of one language."""

    @property
    def config(self) -> dict[str, object]:
        """The description from which the browser builds the page. Its texts are in the language of the request."""
        translations = getattr(self, "i18n_instance", None)
        return {**self.__dict__["config"], "i18n_translations": translations and translations.translations_dict}

    @config.setter
    def config(self, config: dict[str, object]) -> None:
        self.__dict__["config"] = config

    async def process_api(
        self, block_fn: BlockFunction | int, inputs: list[object], *args: object, **kwargs: object
    ) -> dict[str, object]:
        """See `gr.Blocks.process_api`.

        Raises:
            Error: a value has a wrong type, or the function failed. The message is in the language of the request.
        """
        request, event = kwargs.get("request"), kwargs.get("event_data")
        if isinstance(event, gr.EventData):
            event._data = encodable(event._data)
        if isinstance(request, list):  # the request says that it is a batch, and no event takes batches
            request = kwargs["request"] = request[0]
        say = say_for(request)
        function = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
        if function.fn is None:  # only the browser runs it
            raise _refusal(request, say.translate(NO_EVENT))
        # Use a component's default for a missing value.
        inputs = [
            *map(encodable, inputs),
            *(getattr(component, "value", None) for component in function.inputs[len(inputs) :]),
        ]
        wrong = [
            f"{type(component).__name__} {number + 1}"
            for number, (component, value) in enumerate(zip(function.inputs, inputs, strict=False))
            if not fits(component, value)
        ]
        if wrong:
            raise _refusal(request, say("task.wrong_type", names=", ".join(wrong)))
        try:
            result: dict[str, object] = await super().process_api(block_fn, inputs, *args, **kwargs)
            return result
        except Error:
            raise
        except LorakitError as problem:
            raise _refusal(request, say.translate(str(problem))) from None
        except Exception as problem:
            traceback.print_exception(problem)
            text = say("task.failed", error=type(problem).__name__)
            if isinstance(problem, OSError):
                text = system_error(problem, say)
            raise Error(text, print_exception=False) from None

    async def preprocess_data(self, *args: object, **kwargs: object) -> object:
        """See `gr.Blocks.preprocess_data`.

        Raises:
            LorakitError: a component does not accept its value.
        """
        try:
            return await super().preprocess_data(*args, **kwargs)
        except OSError:
            raise
        except Exception as problem:
            reason = _part(problem.__cause__ or problem)
            raise LorakitError("the request has a value that its field cannot have ({reason})", reason) from problem


def _refusal(request: object, text: str) -> Error:
    """An error for an invalid request: the guard answers it with status 422."""
    http_request = getattr(request, "request", None)
    if http_request is not None:
        http_request.scope[STATUS] = 422
    return Error(text, print_exception=False)


def _answer(request: Request, code: int, message: str) -> JSONResponse:
    text = say_for(request).translate(message)
    return JSONResponse({"error": text, "detail": text}, code)  # Gradio's clients read one or the other


async def _refuse_body(request: Request, problem: Exception) -> JSONResponse:
    """Answer a request whose body is not JSON, or not what the route takes."""
    assert isinstance(problem, RequestValidationError)
    first = problem.errors()[0]
    place = ".".join(map(str, first["loc"]))
    line = Message("the request is wrong at {place}: {reason}", place, _part(first["msg"]))
    return _answer(request, 422, line)


async def _refuse_event(request: Request, problem: Exception) -> JSONResponse:
    """Answer a request for an unknown event, for which Gradio's routes raise a KeyError.

    Raises:
        Exception: `problem`, if the route takes no event.
    """
    if EVENT_ROUTE.search(request.url.path):
        return _answer(request, 404, NO_EVENT)
    raise problem


async def _refuse_arguments(request: Request, problem: Exception) -> JSONResponse:
    """Answer a request with missing or unknown arguments, for which Gradio's route raises a TypeError.

    Raises:
        Exception: `problem`, if the route takes no named arguments.
    """
    if "/call/v2/" in request.url.path:
        return _answer(request, 422, Message("the request is wrong at {place}: {reason}", "body", _part(problem)))
    raise problem


# Handlers of the errors that Gradio's routes raise before `Page.process_api`, which would be answered with status 500.
HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[JSONResponse]]] = {
    RequestValidationError: _refuse_body,
    FnIndexInferError: _refuse_event,
    KeyError: _refuse_event,
    TypeError: _refuse_arguments,
}
