"""Commands for adapters: sample, inspect, export, resize, combine, merge, extract, convert and install-adapter."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import config as configuration
from lorakit.cli import threads
from lorakit.cli.imports import model_imports
from lorakit.cli.terminal import complain, print_json, print_lines, remark, tell_step
from lorakit.cli.train_commands import Command, add_model, add_prompts, read_overrides, read_prompts
from lorakit.config import unquote
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.core.names import DEVICE, MAX_NAME_BYTES, is_device, shorten
from lorakit.core.registry import FORMATS
from lorakit.formats.facts.hosts import HOSTS

if TYPE_CHECKING:
    from lorakit.adapters.weights import AdapterWeights

LICENSES = "apache-2.0, cc-by-4.0, creativeml-openrail-m, openrail++, other ..."
TRIGGER, ALIAS, TITLE = "modelspec.trigger_phrase", "ss_output_name", "modelspec.title"


def add(command: Command) -> None:
    """Add the commands of this module by `command(name, run, help)`."""
    sample = command("sample", run_sample, "draw pictures with an adapter")
    sample.add_argument("adapter", metavar="ADAPTER", help="adapter file, run folder or PEFT folder")
    sample.add_argument("--prompt", action="append", metavar="TEXT", help="prompt of a picture; may be repeated")
    add_prompts(sample)
    sample.add_argument(
        "--strength",
        type=_strengths,
        default=(1.0,),
        metavar="0,0.5,1",
        help="strengths to draw, one per row (default: 1)",
    )
    sample.add_argument("--base", default="", metavar="BASE", help="base model (default: the base named in ADAPTER)")
    sample.add_argument("--size", type=_side, metavar="PIXELS", help="side of the pictures (default: as in training)")
    add_model(sample)
    sample.add_argument("--output", metavar="DIR", help="output folder (default: runs/<time>-<name>)")

    inspect = command(
        "inspect", run_inspect, "show the kind, method, rank and trigger of a file, and the programs that can read it"
    )
    inspect.add_argument("file", metavar="FILE", help="safetensors file, PEFT folder, folder of a base, or checkpoint")
    inspect.add_argument(
        "--targets",
        default="",
        metavar="a1111,comfyui",
        help="exit with 1 if one of these programs cannot read the whole file",
    )
    inspect.add_argument("--plot", metavar="FILE.png", help="draw the size of each module's change into a new file")

    export = command("export", run_export, "write an adapter in another format")
    export.add_argument("adapter", metavar="ADAPTER", help="adapter file, run folder or PEFT folder")
    export.add_argument("--to", choices=tuple(FORMATS), required=True, help="format to write")
    _add_output(export)

    resize = command("resize", run_resize, "reduce the rank of an adapter")
    resize.add_argument("adapter", metavar="ADAPTER", help="adapter file, run folder or PEFT folder")
    _add_size(resize)
    _add_format(resize)

    combine = command("combine", run_combine, "combine several adapters into one")
    combine.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[=STRENGTH]", help="adapters with their strengths (default: 1)"
    )
    combine.add_argument("--name", default="combined", help="name of the new adapter (default: combined)")
    _add_format(combine)

    _add_merge(command)

    extract = command("extract", run_extract, "extract a LoRA from the difference of two models")
    extract.add_argument("tuned", metavar="TUNED", help="folder of the fine-tuned model")
    extract.add_argument("--base", required=True, metavar="FOLDER", help="folder of the model before fine-tuning")
    _add_size(extract)
    _add_format(extract)

    _add_install(command)
    _add_push(command)
    convert = command("convert", run_convert, "convert pickled weights to .safetensors without running code from them")
    convert.add_argument("path", metavar="FILE", help=".ckpt, .pt or .bin file, or a folder in diffusers layout")


def _add_merge(command: Command) -> None:
    merge = command("merge", run_merge, "merge an adapter into a base and write the whole model")
    merge.add_argument("adapter", metavar="ADAPTER", help="adapter file, run folder or PEFT folder")
    merge.add_argument("--base", default="", metavar="BASE", help="base model (default: the base named in ADAPTER)")
    add_model(merge)
    merge.add_argument("--strength", type=float, default=1.0, help="strength of the adapter (default: 1)")
    merge.add_argument(
        "--keep-fp8",
        action="store_true",
        help="keep 8-bit weights in 8 bits (default: convert them to fp16, which loses less)",
    )
    merge.add_argument("--output", required=True, metavar="PATH", help="new folder or new .safetensors file")


def _add_install(command: Command) -> None:
    install = command("install-adapter", run_install_adapter, "copy an adapter into the folders of another program")
    install.add_argument("adapter", metavar="ADAPTER", help="adapter file")
    install.add_argument("--into", choices=tuple(HOSTS), required=True, help="program that will use the adapter")
    install.add_argument("--at", required=True, metavar="PATH", help="folder of the program, or of its LoRA files")
    install.add_argument("--name", default="", metavar="NAME", help="name of the copy (default: the name of ADAPTER)")
    install.add_argument(
        "--any-folder", action="store_true", help="accept any folder for --at without checking its contents"
    )


def _add_push(command: Command) -> None:
    push = command("push", run_push, "upload an adapter with a model card and sample pictures to the Hugging Face Hub")
    push.add_argument("source", metavar="RUN_OR_FILE", help="run folder or adapter file")
    push.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="repository; created if missing, private unless --public"
    )
    push.add_argument(
        "--license", required=True, metavar="NAME", help=f"the hub's id of the adapter's license: {LICENSES}"
    )
    push.add_argument("--base-model", default="", metavar="ID", help="hub id of the base, if the file does not name it")
    push.add_argument("--prompts", action="store_true", help="also publish the prompts of the pictures")
    push.add_argument(
        "--public", action="store_true", help="create a public repository, or allow a repository that is public"
    )
    push.add_argument("--replace", action="store_true", help="overwrite files with the same names in the repository")
    push.add_argument("--dry-run", metavar="FOLDER", help="write the files into FOLDER instead of uploading them")


def _add_size(command: argparse.ArgumentParser) -> None:
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="highest rank of a layer")
    size.add_argument("--energy", type=float, metavar="0.95", help="share of the squared singular values to keep")


def _add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument("--to", choices=tuple(FORMATS), default="kohya", help="format to write (default: kohya)")
    _add_output(command)


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="dtype of the weights (default: fp16)"
    )
    command.add_argument("--output", default=".", metavar="DIR", help="output folder (default: the current folder)")
    command.add_argument("--force", action="store_true", help="overwrite existing files")


def run_sample(args: argparse.Namespace) -> int:
    """`lorakit sample`. Writes each picture, and a grid with a row for each strength and a column for each prompt."""
    from lorakit.formats.identify import adapter_file

    file = adapter_file(Path(args.adapter))
    if not file.is_dir():
        safetensors_header.read(file)  # reports a file of another kind before the slow imports
    threads.use_idle_cores()
    with model_imports():
        from lorakit.inference import sampling

    base = args.base or sampling.base_of(args.adapter)
    remark(f"base: {base}")
    overrides = ({"model.vae": args.vae} if args.vae else {}) | read_overrides(args.set)
    prompts = [unquote(prompt) for prompt in read_prompts(args) or ()]
    for prompt in args.prompt or ():
        if unquote(prompt) != prompt.strip():
            remark(Message("--prompt: the quotes around {prompt} are removed", shorten(prompt.strip(), 60)))
    for line in sampling.findings(args.adapter, prompts, base=base, overrides=overrides):
        remark(line)
    files = sampling.sample(
        args.adapter,
        prompts,
        base=base,
        strengths=args.strength,
        folder=args.output,
        size=args.size,
        overrides=overrides,
        progress=lambda count, total: remark(Message("picture {count} of {total}", count, total)),
    )
    if args.json:
        print_json({"grid": str(files[0]), "files": [str(file) for file in files[1:]]})
    else:
        print_lines(str(files[0]))
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """`lorakit inspect`. The exit code is 1 if a program named in `--targets` cannot read all of the file."""
    from lorakit.formats import inspect
    from lorakit.formats.facts import strength
    from lorakit.runs.run_folder import RunFolder

    path = Path(args.file)
    if path.is_dir() and path.parent == RunFolder(path.parent.parent).checkpoints:
        from lorakit.training import checkpoint_export  # needs torch

        report = checkpoint_export.inspect(path)
    else:
        report = inspect.inspect(path)
    if args.plot:
        strength.plot(report.strength, Path(args.plot), report.name)
    failures = report.failures(args.targets.split(","))
    if args.json:
        print_json(report.to_json() | {"failures": failures})
    else:
        print_lines(report.to_text())
    if failures:
        complain("\n".join(failures))
    return 1 if failures else 0


def run_export(args: argparse.Namespace) -> int:
    """`lorakit export`."""
    from lorakit import formats
    from lorakit.formats.identify import adapter_file
    from lorakit.training import checkpoint_export

    source = Path(args.adapter)
    tell_step(1)
    weights = checkpoint_export.read(source) if checkpoint_export.is_checkpoint(source) else formats.read(source)
    return _write(args, weights, adapter_file(source).stem, weights.metadata, [args.adapter])


def run_push(args: argparse.Namespace) -> int:
    """`lorakit push`."""
    from lorakit.runs import publish

    publication = publish.gather(
        args.source, license=args.license, base_model=args.base_model, prompts=args.prompts, ask=not args.dry_run
    )
    for line in publication.notes:
        remark(line)
    if args.dry_run:
        files = publish.write(publication, args.repo, Path(args.dry_run))
        _tell(args, {path.relative_to(args.dry_run).as_posix(): path for path in files})
        return 0
    url = publish.send(publication, args.repo, public=args.public, replace=args.replace)
    if args.json:
        print_json({"commit": url})
    else:
        print_lines(url)
    return 0


def run_resize(args: argparse.Namespace) -> int:
    """`lorakit resize`."""
    from lorakit import formats
    from lorakit.formats.edit.resize_combine import resize
    from lorakit.formats.identify import adapter_file

    tell_step(1)
    weights = resize(formats.read(Path(args.adapter)), rank=args.rank, energy=args.energy)
    name = f"{adapter_file(Path(args.adapter)).stem}-resized"
    return _write(args, weights, name, weights.metadata | {ALIAS: name, TITLE: name}, [args.adapter])


def run_combine(args: argparse.Namespace) -> int:
    """`lorakit combine`. The result has the triggers of all the adapters."""
    from lorakit import formats
    from lorakit.formats import metadata as meta
    from lorakit.formats.edit.resize_combine import combine

    args.name = args.name.removesuffix(".safetensors")
    sources = [configuration.split_strength(text) for text in args.adapters]
    parts = [(formats.read(path), strength) for path, strength in sources]
    triggers = dict.fromkeys(weights.metadata.get(TRIGGER, "") for weights, _ in parts)
    metadata = meta.shared([weights.metadata for weights, _ in parts])
    metadata |= {TRIGGER: ", ".join(filter(None, triggers)), ALIAS: args.name, TITLE: args.name}
    return _write(args, combine(parts), args.name, metadata, [path for path, _ in sources])


def run_merge(args: argparse.Namespace) -> int:
    """`lorakit merge`."""
    from lorakit import families, formats
    from lorakit.families import adapter_base, single_file
    from lorakit.formats.edit.merge import merge
    from lorakit.formats.edit.precision import Precision

    if is_device(Path(args.output).name):
        raise LorakitError(DEVICE, "--output", Path(args.output).name)
    weights = formats.read(Path(args.adapter))
    base = args.base or adapter_base.find(Path(args.adapter), weights.metadata)
    overrides = {"model.base": base, "model.vae": args.vae or "", **read_overrides(args.set)}
    if other := [key for key in overrides if not key.startswith("model.")]:
        raise LorakitError("--set {option}: merge takes options of the section model only", other[0])
    info = families.describe(configuration.load(None, {"train.steps": 1, **overrides}).model)
    if weights.family != info.family:
        raise LorakitError(
            "{adapter} is for {family}, but base {title} is {other}",
            Path(args.adapter).name,
            weights.family,
            info.title,
            info.family,
        )
    if args.output.lower().endswith(".safetensors") and (untold := single_file.untold(info)):
        raise LorakitError(
            "one file does not tell {untold} of base {title}, so that no program would read it "
            "right: --output must be a new folder",
            untold,
            info.title,
        )
    for word in weights.embeddings:
        remark(Message("the merged model does not contain the embedding of {word!r}: keep its file too", word))
    precision = Precision(keep_fp8=args.keep_fp8)
    merged = merge(weights, info, Path(args.output), args.strength, precision=precision)
    remark(precision.line())
    _tell(args, {"merged": merged})
    return 0


def run_extract(args: argparse.Namespace) -> int:
    """`lorakit extract`."""
    from lorakit import families
    from lorakit.formats.edit.extract import extract

    base, tuned = families.describe(args.base), families.describe(args.tuned)
    if base.family != tuned.family:
        raise LorakitError(
            "{title} is {family}, but {base} is {other}: both must be of one family",
            tuned.title,
            tuned.family,
            base.title,
            base.family,
        )
    weights = extract(base.path, tuned.path, base.family, rank=args.rank, energy=args.energy)
    name = f"{tuned.path.name}-extracted"
    return _write(args, weights, name, {ALIAS: name, TITLE: name}, [])


def run_convert(args: argparse.Namespace) -> int:
    """`lorakit convert`."""
    from lorakit.formats.edit.convert import convert

    _tell(args, convert(Path(args.path)))
    return 0


def run_install_adapter(args: argparse.Namespace) -> int:
    """`lorakit install-adapter`."""
    from lorakit.formats.edit import hosts

    host = HOSTS[args.into]
    files = hosts.install(
        Path(args.adapter), host, Path(args.at), name=args.name, any_folder=args.any_folder, say=remark
    )
    if "adapter" in files:
        remark(f"{host.title}: {host.then.format(folder=files['adapter'].parent.absolute())}")
    _tell(args, files)
    return 0


def _write(
    args: argparse.Namespace,
    weights: AdapterWeights,
    name: str,
    metadata: Mapping[str, str],
    sources: Sequence[str | Path],
) -> int:
    """Write the adapter in the requested format and return the exit code.

    Raises:
        LorakitError: the name is not valid, the file exists and `--force` is not given, or it is one of the `sources`.
    """
    from lorakit import formats
    from lorakit.formats import adapter_math, compatibility
    from lorakit.formats.saving import destination, occupied, take_along

    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise LorakitError(
            "{name}: this name is too long for a file; give one of at most 200 letters", shorten(name, 40)
        )
    if is_device(name):
        raise LorakitError(DEVICE, "--name", name)
    fmt = args.to if weights.layers else "kohya"  # embeddings use the suffix of this format
    folder = Path(args.output)
    target = destination(folder, name, fmt).resolve()
    for source in sources:
        if Path(source).resolve() == target:
            raise LorakitError("{source} would be overwritten: give another folder with --output", source)
    there = [] if args.force else occupied(folder, name, fmt)
    if there:
        raise LorakitError("{file} exists already: name another folder with --output, or give --force", there[0])
    tell_step(2)
    say = functools.partial(print, file=sys.stderr)
    for kind in adapter_math.kinds(weights):
        if warning := compatibility.warning(kind, fmt):
            say(f"export: {warning}")
    paths = formats.save(weights, folder, name, [fmt], args.dtype, metadata, say=say)
    if len(sources) == 1 and fmt in paths:
        take_along(Path(sources[0]), paths[fmt], fmt)
    _tell(args, paths)
    return 0


def _tell(args: argparse.Namespace, files: Mapping[str, Path]) -> None:
    """Print the paths of the written files, as lines or as JSON."""
    if args.json:
        print_json({name: str(path) for name, path in files.items()})
    else:
        print_lines(*map(str, files.values()))


def _strengths(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(Message("{text!r}: write numbers separated by commas, e.g. 0,0.5,1", text))
    return values


def _side(text: str) -> int:
    side = next(option for option in configuration.options() if option.key == "data.resolution")
    low, high = int(side.low or 0), int(side.high or 0)
    if not text.isdecimal() or int(text) % 8 or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(
            Message("{text!r}: must be a multiple of 8 from {low} to {high}", text, low, high)
        )
    return int(text)
