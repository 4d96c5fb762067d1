"""A training script of the shape of timm's own: factory optimizer, task for the loss, scaler, clipping, EMA."""

import argparse
import contextlib

import torch
from timm import create_model, utils
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import ClassificationTask


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--clip-grad", type=float, default=None)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--amp-dtype", default="")
    parser.add_argument("--skip-backward-at", type=int, default=-1)
    parser.add_argument("--save", required=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    device = utils.init_distributed_device(argparse.Namespace(device="cpu"))
    distributed = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=10, in_chans=1).to(device)
    task = ClassificationTask(model, criterion=LabelSmoothingCrossEntropy(0.1), device=device, verbose=False)
    trainable = task.get_trainable_module()
    optimizer = create_optimizer_v2(trainable, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    task.setup_ema(decay=0.5)
    if distributed:
        task.prepare_distributed()
    amp = contextlib.nullcontext
    scaler = None
    if args.amp_dtype:
        dtype = getattr(torch, args.amp_dtype)
        amp = lambda: torch.autocast("cpu", dtype)  # noqa: E731
        scaler = utils.NativeScaler(device="cpu") if dtype == torch.float16 else None
    generator = torch.Generator().manual_seed(100 + rank)
    task.train()
    for step in range(3):
        for micro in range(args.grad_accum_steps):
            images = torch.randn(8, 1, 32, 32, generator=generator)
            target = torch.randint(0, 10, (8,), generator=generator)
            last = micro + 1 == args.grad_accum_steps
            module = task.get_trainable_module()
            with contextlib.nullcontext() if last or not distributed else module.no_sync():
                with amp():
                    result = task(images, target)
                loss = result["loss"]
                if step == args.skip_backward_at:
                    continue
                if args.grad_accum_steps > 1:
                    loss /= args.grad_accum_steps
                parameters = task.get_clip_parameters(exclude_head=False)
                if scaler is not None:
                    scaler(loss, optimizer, clip_grad=args.clip_grad, parameters=parameters, need_update=last)
                else:
                    loss.backward()
                    if last and args.clip_grad is not None:
                        utils.dispatch_clip_grad(parameters, args.clip_grad)
                    if last:
                        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)
    if rank == 0:
        average = task.get_trainable_module(ema=True).module
        torch.save({"model": model.state_dict(), "ema": average.state_dict()}, args.save)
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
