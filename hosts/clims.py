"""CLIMS's mask generator: a classifier without bias on a CNN. Its masks in training are sigmoid(logits), its
maps at inference relu(logits).

    S = ResNet50(num_classes=20)
    maps = S.maps(images)                                     # RGB in [0, 1], (B, 3, H, W) -> (B, C, h, w)
"""
import torch
import torch.nn as nn


class Clims(nn.Module):
    """A 1x1 classifier on `features` of `width` channels, which a subclass gives."""

    last_layers = ("classifier.",)
    never_train = ()
    maps_are_masks = True                                     # no min-max
    pool = None                                               # no attention is fused

    def __init__(self, width, num_classes):
        super().__init__()
        self.classifier = nn.Conv2d(width, num_classes, 1, bias=False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        # Differs from CLIMS's code, which lets the statistics follow: they would depend on the number of
        # processes.
        return freeze_statistics(super().train(mode))

    def maps(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> (B, C, h, w), >= 0"""
        return self.class_logits(images).relu()

    def forward(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> masks (B, C, h, w) in (0, 1); a tuple of one: the CAM classifier's
        (B, C)"""
        logits = self.class_logits(images)
        return logits.sigmoid(), (logits.mean((-2, -1)),)

    def class_logits(self, images):
        """RGB in [0, 1] (B, 3, H, W) -> (B, C, h, w)"""
        return self.classifier(self.features((images - self.mean) / self.std)).float()


class ResNet50(Clims):
    """CLIMS's generator, at stride 16."""

    # From the authors' code, not in the paper: the first convolution and its BatchNorm never train.
    never_train = ("backbone.conv1.", "backbone.bn1.")

    def __init__(self, num_classes):
        from torchvision.models import resnet50
        super().__init__(2048, num_classes)
        self.backbone = resnet50()
        del self.backbone.fc
        last = self.backbone.layer4[0]                        # strides 2, 2, 2, 1 and no dilation
        last.conv2.stride = last.downsample[0].stride = (1, 1)

    def features(self, x):
        """(B, 3, H, W) normalised -> (B, 2048, h, w)"""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))

    def load_imagenet(self, state):
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        self.backbone.load_state_dict(state)


def freeze_statistics(model):
    """BatchNorm uses the statistics of pre-training and never updates them, for any number of processes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def parameter_groups(S, lr, head_rate):
    """For the optimizer: all that may train of S; the classifier learns head_rate times as fast."""
    for name, weight in S.named_parameters():
        weight.requires_grad_(not name.startswith(S.never_train))
    backbone = [weight for name, weight in S.named_parameters()
                if weight.requires_grad and not name.startswith(S.last_layers)]
    return [{"params": backbone, "lr": lr}, {"params": list(S.classifier.parameters()), "lr": head_rate * lr}]
