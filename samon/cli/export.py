"""Export a trained model as ONNX, as timm's single file, or as timm's folder with a model card, also to the hub.

    samon-export output/train/RUN --onnx model.onnx        # verified against onnxruntime
    samon-export output/train/RUN/checkpoint-3.dcp --file weights.pth.tar   # a sharded checkpoint
    samon-export output/train/RUN --timm DIR               # timm.create_model("local-dir:DIR", pretrained=True)
    samon-export output/train/RUN --push NAME/REPO         # the same, uploaded by timm (log in with `hf auth login`)
    samon-export output/train/RUN --timm DIR --results results.json         # samon-validate's results in the model card

Weights and preprocessing are those that samon-validate evaluates; further flags of samon-validate go after --.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from timm.models import push_to_hf_hub
from timm.models._hub import generate_readme, save_for_hf
from torch import nn

import samon
from samon.cli.eval_model import Job, build
from samon.cli.program import parse_before_dashes
from samon.cli.validate import parse
from samon.engines.ascent import make_ascent
from samon.errors import RunError, UserError, error_line, require_package
from samon.evals.context import EvalContext, predict
from samon.evals.results import markdown
from samon.files import atomic_write, check_writable, name_write_errors, write_text
from samon.geometry import GEOMETRIES
from samon.registry import variant_of
from samon.trainer.dcp import convert_to_file
from samon.trainer.distributed import DistInfo, console_logging
from samon.trainer.flag_rows import SAM
from samon.trainer.state import DCP_SUFFIX, Tree, load_file, load_state, stored_args

# Of timm's configuration of a model, what describes timm's own pretrained weights.
_WEIGHTS_KEYS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
TOLERANCE = 1e-3  # of the largest logit: float32 kernels of two programs add up in different orders


def export_onnx(context: EvalContext, path: Path) -> float:
    """Write an ONNX file from `images` [N, C, H, W], any N, to `logits`; return the largest difference of the logits.

    Raises:
        UserError: a package is missing, or torch cannot export the model.
        RunError: onnxruntime computes other logits; no file is written.
    """
    message = "--onnx needs other packages; run: pip install onnx onnxruntime onnxscript"
    require_package("onnxscript", message)  # torch's exporter needs it
    onnxruntime = require_package("onnxruntime", message)
    model, name = context.model, context.config.model
    example = torch.randn(2, *context.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    args, sizes = (example,), ({0: "batch"},)
    try:
        program = torch.onnx.export(
            model,
            args,
            dynamo=True,
            verbose=False,
            dynamic_shapes=sizes,
            input_names=["images"],
            output_names=["logits"],
        )
    except Exception as error:  # the exporter raises exceptions of many kinds
        raise UserError(f"torch cannot export {name} to ONNX: {' '.join(str(error).split())[:200]}") from None
    assert program is not None  # dynamo=True
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = torch.cat([example, example.flip(0), example])[:5]  # another batch size than it was traced with
    with torch.no_grad():
        expected = predict(model, images)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    difference = float((torch.from_numpy(logits) - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise RunError(f"{path} is not written: onnxruntime's logits of {name} differ by {difference:.2g}")
    with atomic_write(path, len(content)) as file:
        file.write(content)
    return difference


def perturbation_details(stored: Tree) -> dict[str, str]:
    """What a run perturbed, and when; nothing of a run without SAM."""
    variant = variant_of(stored.get("opt", ""))
    if variant is None:
        return {}
    pattern = stored.get("perturb")
    details = {
        "Scope": f"{variant.scope} ({variant.target}" + (f", names matching `{pattern}`)" if pattern else ")"),
        "Geometry": GEOMETRIES[variant.geometry].description,
    }
    for flag in SAM:
        value, always = stored.get(flag.key), flag.key in ("radius", "ascent", "m_sharpness")
        in_words = flag.key.startswith("sam_") or flag.key in ("perturb", "no_replay")
        if value is not None and (always or value != flag.default) and not in_words:
            details[flag.name] = str(value)
    ascent = make_ascent(stored.get("ascent") or "batch")
    if ascent.single_pass:
        return details | {"Two passes": f"never (`--ascent {ascent.name}` makes no ascent pass)"}
    tail, end, every = stored.get("sam_tail"), stored.get("sam_end_epoch"), stored.get("sam_every") or 1
    updates = [f"in the last {100 * tail:g} % of updates (tail)"] if tail else []
    updates += [f"from epoch {stored['sam_start_epoch']}"] if stored.get("sam_start_epoch") else []
    updates += [f"before epoch {end}"] if end is not None else []
    updates += [f"in every {every}th update"] if every > 1 else []
    updates += [f"where {ascent.name} makes an ascent pass"] if ascent.name.startswith(("looksam", "aesam")) else []
    return details | {"Two passes": ", ".join(updates) or "in all updates (no tail)"}


def evaluation_table(path: Path, checkpoint: str, use_ema: bool) -> str:
    """Markdown table of a checkpoint's results, or its average's, in a file of `samon-validate --results-file`."""
    try:
        rows = json.loads(path.read_text())
        same = [row for row in rows if Path(row.get("checkpoint", "")).resolve() == Path(checkpoint).resolve()]
        same = [row for row in same if row.get("ema", use_ema) == use_ema]  # earlier versions did not record it
        table = markdown([{key: value for key, value in row.items() if key != "checkpoint"} for row in same])
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"--results {path}: {error_line(error)}; name a .json file of samon-validate") from None
    if not same:
        command = f"samon-validate --checkpoint {checkpoint} --results-file FILE.json"
        raise UserError(f"--results {path} has no results of these weights; run {command}")
    return table


def model_card(job: Job, content: Tree, license_name: str, results: Path | None) -> Tree:
    """timm's model card: architecture, training, accuracy and usage."""
    stored = stored_args(content)
    details = {"Model Type": "Image classification", "Architecture": job.config.model}
    for name, key in {"Dataset": "dataset", "Optimizer": "opt", "Learning rate": "lr"}.items():
        if stored.get(key):
            details[name] = stored[key]
    details |= perturbation_details(stored)
    if "epoch" in content:
        details["Epochs"] = content["epoch"] + 1
    if content.get("metric") is not None:
        name = f"Validation {stored.get('eval_metric', 'metric')}"
        details[name if stored.get("val_split", True) else "Training loss"] = f"{content['metric']:.2f}"
    opt = stored.get("opt", "")
    method = f" with sharpness-aware minimization (`--opt {opt}`)" if samon.is_sam_name(opt) else ""
    usage = '```python\nimport timm\n\nmodel = timm.create_model("hf-hub:NAME/REPO", pretrained=True).eval()\n```'
    if results is not None:
        usage += f"\n\n## Evaluation\n\n{evaluation_table(results, job.checkpoint, job.use_ema)}"
    description = f"A timm `{job.config.model}` trained by samon {samon.__version__}{method}."
    return {"description": description, "details": details, "usage": usage, "license": license_name}


def hub_arguments(job: Job, context: EvalContext) -> Tree:
    """Arguments of timm's hub functions: classes, factory arguments, preprocessing."""
    own = {"label_names": context.class_names, "global_pool": job.config.gp}
    model_config = {"num_classes": context.num_classes} | {key: value for key, value in own.items() if value}
    return {"model_config": model_config, "model_args": job.config.model_kwargs, "data_config": context.data_config}


def save_folder(model: nn.Module, folder: Path, card: Tree, hub_args: Tree) -> None:
    """Write timm's folder; it appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        complete = Path(temporary, "complete")
        with name_write_errors(folder):
            save_for_hf(model, str(complete), safe_serialization=True, **hub_args)
        write_text(complete / "README.md", generate_readme(card, folder.resolve().name))
        complete.replace(folder)  # also replaces an empty folder


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="samon-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="run directory or checkpoint")
    add("--model", default="", help="timm model, if the checkpoint does not name it")
    add("--onnx", type=Path, metavar="FILE", help="ONNX file to write")
    add("--file", type=Path, metavar="FILE", help="convert a sharded checkpoint to timm's single file")
    add("--timm", type=Path, metavar="DIR", help="folder to write: weights, config.json, README.md")
    add("--push", default="", metavar="NAME/REPO", help="hub repository to upload the same to")
    add("--results", type=Path, metavar="FILE", help="results of samon-validate (.json) for the model card")
    add("--private", action="store_true", help="--push: make the repository private")
    add("--license", default="unknown", help="of the weights, for --timm and --push (default %(default)s)")
    args = parse_before_dashes(parser, argv, "samon-validate")
    if not (args.onnx or args.timm or args.push or args.file):
        raise UserError("nothing to export: give --onnx FILE, --file FILE, --timm DIR or --push NAME/REPO")
    if (args.file is not None) != (Path(args.checkpoint).suffix == DCP_SUFFIX):
        raise UserError("--file converts a sharded checkpoint (NAME.dcp); everything else needs a converted one")
    folder = args.timm
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--timm {folder} is not empty or is a file; name a new folder")
    for flag, path in {"--onnx": args.onnx, "--file": args.file, "--timm": folder}.items():
        if path and not (path is folder and folder.is_dir()):
            check_writable(flag, path)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.file:
        load_state(Path(args.checkpoint), "CHECKPOINT")  # raises if it is not complete
        convert_to_file(Path(args.checkpoint), args.file)
        print(f"{args.file}: samon-validate --checkpoint {args.file}")
        return
    flags = ["--checkpoint", args.checkpoint, *(["--model", args.model] * bool(args.model)), *args.after]
    (job,) = parse([*flags, "--dataset", "", "--data-dir", ".", "--device", "cpu"])  # no data set is read
    dist_info = DistInfo(torch.device("cpu"), 0, 1)
    dtype = None if args.onnx else job.config.model_dtype  # onnxruntime on a CPU computes in float32
    with console_logging(dist_info):  # contiguous weights, as files store them
        context = build(replace(job, config=job.config.but(channels_last=False, model_dtype=dtype)), dist_info)
    if args.onnx:
        difference = export_onnx(context, args.onnx)
        print(f"{args.onnx}: onnxruntime's logits differ by at most {difference:.1e}")
    if args.timm or args.push:
        content = {} if job.checkpoint.endswith(".safetensors") else load_file(Path(job.checkpoint), "CHECKPOINT")
        card, hub_args = model_card(job, content, args.license, args.results), hub_arguments(job, context)
        model = context.model
        assert isinstance(model.pretrained_cfg, dict)
        for key in _WEIGHTS_KEYS:
            model.pretrained_cfg.pop(key, None)
        if args.timm:
            save_folder(model, args.timm, card, hub_args)
            print(f'{args.timm}: timm.create_model("local-dir:{args.timm}", pretrained=True)')
        if args.push:
            options = hub_args | {"private": args.private, "model_card": card, "safe_serialization": True}
            try:
                push_to_hf_hub(model, args.push, **options)
            except Exception as error:  # whatever the hub's client raises
                do = "nothing is lost, start the command again"
                raise RunError(f"--push {args.push}: {error_line(error)}; {do}") from error
            print(f'timm.create_model("hf-hub:{args.push}", pretrained=True)')
