"""A layer of your own and its drop-in: python examples/own_layer.py"""

import torch
from torch import Tensor, nn

import backrazor as br
from backrazor import functional
from backrazor.nn import DropIn, LayerRules


class GatedUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.values, self.gate = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x) * self.gate(x).sigmoid()


class RazorGatedUnit(DropIn, GatedUnit):
    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return f"the values at sparsity {rules.pruned.sparsity:g}, the gate dense"  # its Linears speak for themselves

    def forward(self, x: Tensor) -> Tensor:
        values = self.values(x)
        return functional.channel_scale(values, self.gate(x).sigmoid(), self.razor.pruned, self.flag_for(values))


def main() -> None:
    model, x = nn.Sequential(GatedUnit(256, 512), nn.Linear(512, 10)), torch.randn(64, 256)
    with br.register(GatedUnit, RazorGatedUnit):  # without `with`: for the rest of the process
        print(br.razor_(model, br.RazorConfig(sparsity=0.9)))
    model(x).square().mean().backward()
    print(f"saved for backward: {br.memory.predict(model, (256,), batch_size=64).saved_bytes} bytes")


if __name__ == "__main__":
    main()
