"""Networks of LinCa with random weights, and parameters that hold them."""

import json

import torch

from cachec.compiler.methods.linca_net import InvertibleNet
from cachec.compiler.methods.parameters import Parameters

CHANNELS, SPLIT = 8, [5, 2, 1]


def random_net(seed, blocks=2):
    torch.manual_seed(seed)
    net = InvertibleNet(CHANNELS, blocks, 6)
    for parameter in net.parameters():  # the last layers begin at zero
        torch.nn.init.normal_(parameter, std=0.3)
    for block in net.blocks:
        torch.nn.init.orthogonal_(block.conv1x1.weight)
    return net.eval()


def fitted(nets, lengths):
    arrays = {f"segment{i}.net.{name}": v.numpy() for i, net in enumerate(nets) for name, v in net.state_dict().items()}
    return Parameters(arrays, {"split": json.dumps(SPLIT), "segments": json.dumps(lengths)}, "a test")
