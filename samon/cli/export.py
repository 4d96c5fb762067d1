"""A trained model for elsewhere: ONNX, timm's single file, or its folder with a model card, also on the hub.

    samon-export output/train/RUN --onnx model.onnx        # checked against onnxruntime
    samon-export output/train/RUN/checkpoint-3.dcp --file weights.pth.tar   # of --checkpoint-format dcp
    samon-export output/train/RUN --timm DIR               # timm.create_model("local-dir:DIR", pretrained=True)
    samon-export output/train/RUN --push NAME/REPO         # the same, uploaded by timm (log in with `hf auth login`)

Weights and preprocessing are those that samon-validate scores; further flags of samon-validate go after --.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models import push_to_hf_hub
from timm.models._hub import generate_readme, save_for_hf
from torch import Tensor, nn

import samon
from samon.cli.program import parse_before_dashes, run_script
from samon.errors import RunError, UserError
from samon.evals.entry import Target, predict
from samon.evals.main import Job, build, parse
from samon.files import atomic_write, check_writable, name_write_errors, write_text
from samon.trainer.dcp import convert_to_file
from samon.trainer.distributed import DistInfo, console_logging
from samon.trainer.state import DCP_SUFFIXES, load_file, load_state, stored_args

# In timm's configuration of a model: whose weights its own pretrained ones are, which ours are not.
ORIGIN = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
TOLERANCE = 1e-3  # of the largest logit: float32 kernels of two programs add up in different orders


class Logits(nn.Module):
    """The model's first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return predict(self.model, images)


def to_onnx(target: Target, path: Path) -> float:
    """Write an ONNX file that takes `images` [N, C, H, W], any N, to `logits`; returns the largest difference.

    Raises:
        UserError: the packages are missing, or torch cannot export the model.
        RunError: onnxruntime computes something else; no file is written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch's exporter is made of
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}; run: pip install onnx onnxruntime onnxscript") from None
    net, size = Logits(target.model).eval(), target.data_config["input_size"]
    example = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    try:
        program: Any = torch.onnx.export(net, (example,), dynamo=True, verbose=False, **how)
    except Exception as error:  # the exporter has exceptions of its own, of many kinds
        text = " ".join(str(error).split())[:200]
        raise UserError(f"torch cannot export {target.config.model} to ONNX: {text}") from None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = torch.cat([example, example.flip(0), example])[:5]  # another batch size than it was traced with
    with torch.no_grad():
        right = net(images)
    (found,) = session.run(None, {"images": images.numpy()})
    off = float((torch.from_numpy(found) - right).abs().max())
    if not off <= TOLERANCE * float(right.abs().max()):
        raise RunError(f"{path} is not written: onnxruntime's logits of {target.config.model} differ by {off:.2g}")
    with atomic_write(path, len(content)) as file:
        file.write(content)
    return off


def card(job: Job, content: dict[str, Any], license_name: str) -> dict[str, Any]:
    """timm's model card: what it is, how it was trained, what it reached, how it is used."""
    stored = stored_args(content)
    details = {"Model Type": "Image classification", "Architecture": job.config.model}
    for name, key in {"Dataset": "dataset", "Optimizer": "opt", "rho": "rho", "Learning rate": "lr"}.items():
        if stored.get(key):
            details[name] = stored[key]
    if "epoch" in content:
        details["Epochs"] = content["epoch"] + 1
    if content.get("metric") is not None:
        details[f"Validation {stored.get('eval_metric', 'metric')}"] = f"{content['metric']:.2f}"
    opt = stored.get("opt", "")
    how = f" with sharpness-aware minimization (`--opt {opt}`)" if samon.is_sam_name(opt) else ""
    usage = '```python\nimport timm\n\nmodel = timm.create_model("hf-hub:NAME/REPO", pretrained=True).eval()\n```'
    what = f"A timm `{job.config.model}` trained by samon {samon.__version__}{how}."
    return {"description": what, "details": details, "usage": usage, "license": license_name}


def timm_arguments(job: Job, target: Target) -> dict[str, Any]:
    """What timm's hub functions write beside the weights: classes, factory arguments, preprocessing."""
    model_config: dict[str, Any] = {"num_classes": int(target.model.num_classes)}  # type: ignore[arg-type]
    if target.class_names:
        model_config["label_names"] = list(target.class_names)
    if job.config.gp:
        model_config["global_pool"] = job.config.gp
    arguments = dict(job.config.model_kwargs) or None
    return {"model_config": model_config, "model_args": arguments, "data_config": dict(target.data_config)}


def to_folder(model: nn.Module, folder: Path, about: dict[str, Any], how: dict[str, Any]) -> None:
    """timm's folder, there once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parts:
        made = Path(parts, "made")
        with name_write_errors(folder):
            save_for_hf(model, str(made), safe_serialization=True, **how)
        write_text(made / "README.md", generate_readme(about, folder.resolve().name))
        made.replace(folder)  # an empty folder is replaced


def arguments(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="samon-export", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="run directory or checkpoint")
    add("--model", default="", help="timm model, where the checkpoint does not say it")
    add("--onnx", type=Path, metavar="FILE", help="ONNX file to write")
    add("--file", type=Path, metavar="FILE", help="a state in parts as timm's single file, to continue or to evaluate")
    add("--timm", type=Path, metavar="DIR", help="folder to write: weights, config.json, README.md")
    add("--push", default="", metavar="NAME/REPO", help="repository on the hub to upload the same to")
    add("--private", action="store_true", help="--push: make the repository private")
    add("--license", default="unknown", help="of the weights, for --timm and --push (default %(default)s)")
    args = parse_before_dashes(parser, argv, "samon-validate")
    if not (args.onnx or args.timm or args.push or args.file):
        raise UserError("nothing to make: give --onnx FILE, --file FILE, --timm DIR or --push NAME/REPO")
    if (args.file is not None) != (Path(args.checkpoint).suffix in DCP_SUFFIXES):
        raise UserError("--file is for a sharded checkpoint (NAME.dcp), and those need --file: convert it first")
    for flag, path in {"--onnx": args.onnx, "--file": args.file}.items():
        if path:
            check_writable(flag, path)
    if args.timm and args.timm.is_file():
        raise UserError(f"--timm {args.timm} is a file; name a folder")
    if args.timm and args.timm.exists():
        if any(args.timm.iterdir()):
            raise UserError(f"--timm {args.timm} is not empty; name a new folder")
    elif args.timm:
        check_writable("--timm", args.timm)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.file:
        load_state(Path(args.checkpoint), "CHECKPOINT")  # says what is wrong with it
        convert_to_file(Path(args.checkpoint), args.file)
        print(f"{args.file}: samon-validate --checkpoint {args.file}")
        return
    words = ["--checkpoint", args.checkpoint, *(["--model", args.model] * bool(args.model)), *args.after]
    (job,) = parse([*words, "--dataset", "", "--data-dir", ".", "--device", "cpu"])  # no data set is read
    world = DistInfo(torch.device("cpu"), 0, 1)
    with console_logging(world):
        target = build(replace(job, config=job.config.but(channels_last=False)), world)  # files hold plain tensors
    content = {} if job.path.endswith(".safetensors") else load_file(Path(job.path), "CHECKPOINT")
    if args.onnx:
        off = to_onnx(target, args.onnx)
        print(f"{args.onnx}: onnxruntime's logits differ by at most {off:.1e}")
    if args.timm or args.push:
        about, how = card(job, content, args.license), timm_arguments(job, target)
        model: Any = target.model
        model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in ORIGIN}
        if args.timm:
            to_folder(model, args.timm, about, how)
            print(f'{args.timm}: timm.create_model("local-dir:{args.timm}", pretrained=True)')
        if args.push:
            kept: dict[str, Any] = {"private": args.private, "model_card": about, "safe_serialization": True}
            try:
                push_to_hf_hub(model, args.push, **kept, **how)
            except Exception as error:  # the hub's client, and what it is made of, have exceptions of their own
                text = " ".join(str(error).split()) or type(error).__name__
                raise RunError(f"--push {args.push}: {text[:300]}; nothing is lost, start the command again") from error
            print(f'timm.create_model("hf-hub:{args.push}", pretrained=True)')


if __name__ == "__main__":
    run_script(main)
