"""Stage 0 of CLIMS: its generator learns from image labels alone, as IRN trains its CAM classifier.

Paper   SemPLeS Table 4, the host CLIMS (Xie et al. 2022), which starts from IRN's (Ahn et al. 2019)
Reads   images and image labels of --data, ImageNet weights
Writes  <out>/cls.pt, <out>/cls.last.pt (to resume), <out>/cls.jsonl

The loss is the multi-label soft margin of the image's logits, the mean of the class maps. All of S trains but
its first convolution.

    python -m hosts.train_cam --data /data/VOC2012 --out runs/voc_clims
    python -m hosts.train_cam --data /data/VOC2012 --out runs/voc_clims --init res50_cam.pth   # IRN's
    python -m hosts.train_cam --data data/toy --out runs/clims --split train --generator clims_toy \\
        --backbone data/toy/backbone.pt --crop 96
"""
import torch

from hosts import clims
from plumbing import checkpoints, flags, folders, guard, networks, processes, samples
from wsss import losses


def parse():
    p = flags.parser(__doc__, batch_size=16)
    g = p.add_argument_group("SemPLeS Table 4, CLIMS's classifier")
    g.add_argument("--generator", choices=["resnet50", "clims_toy"], default="resnet50",
                   help="architecture of S")
    g.add_argument("--backbone", default="imagenet",
                   help="weights the backbone starts from: imagenet (downloaded once), none, or a file")
    g.add_argument("--init", help="published generator (IRN, CLIMS) to take as cls.pt instead of training")
    g.add_argument("--epochs", type=flags.positive, default=5)
    g.add_argument("--lr", type=flags.number, default=0.1, help="SGD's rate, poly 0.9 to 0")
    g.add_argument("--head-rate", type=flags.above_zero, default=10.0,
                   help="rate of the classifier, times --lr")
    # From the authors' code, not in the paper: IRN's optimizer, and so CLIMS's, hands its weight decay to SGD
    # as momentum, which makes rates ten times smaller than with 0.9.
    g.add_argument("--momentum", type=flags.share, default=1e-4, help="SGD's momentum")
    g.add_argument("--weight-decay", type=flags.number, default=1e-4)
    g.add_argument("--crop", type=flags.positive, default=512, help="side of the random crop in pixels")
    g.add_argument("--min-scale", type=flags.fraction, default=0.5, help="least share of an image in a crop")
    flags.training(p)
    return p.parse_args()


def main():
    args = parse()
    run = processes.Run(args)
    keeper = checkpoints.Keeper(run, args, "cls.pt", start=args.init or args.backbone)
    if keeper.finished:
        return
    folder = folders.Folder(args.data)
    if args.init:
        S = networks.load_generator(args.init, run, folder.classes)
        return keeper.finish(model=S, classes=folder.classes)

    S = run.in_turn(lambda: networks.new_generator(args.generator, len(folder.classes), args.backbone))
    S = S.to(run.device)
    ids = folder.ids(args.split, args.limit)
    augment = samples.train_transform(args.crop, args.min_scale)
    loader = samples.loader(samples.Samples(folder, ids, augment, args.seed), run, args)
    optimizer = torch.optim.SGD(clims.parameter_groups(S, args.lr, args.head_rate), momentum=args.momentum,
                                weight_decay=args.weight_decay)
    steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    S = keeper.begin(S, optimizer, schedule, loader, steps)

    for images, labels in keeper.steps():
        labels = labels.to(run.device, non_blocking=True)                             # (B, C)
        with run.autocast():
            _, (logits,) = S(images)                                                  # (B, C)
        loss = run.mean(losses.cls_loss(logits, labels))

        optimizer.zero_grad(set_to_none=True)
        keeper.backward(loss)
        keeper.step()
        right = ((logits > 0) == (labels > 0)).float()
        keeper.after(loss=loss, accuracy=run.mean(right.flatten()))
    keeper.finish(model=S, classes=folder.classes)


if __name__ == "__main__":
    guard.run(main)
