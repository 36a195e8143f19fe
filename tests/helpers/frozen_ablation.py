"""Runs ablation.py with frozen norms, so that one process and several processes compute the same.

    torchrun --nproc-per-node 2 tests/helpers/frozen_ablation.py OUTPUT

The trained weights are written to OUTPUT/weights.safetensors.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / 'train_scripts'))

import ablation
from ablations.trainer import Trainer
from safetensors.torch import save_file
from timm.layers import freeze_batch_norm_2d

COMMAND = ['--acts', 'atac', '--seeds', '1', '--epochs', '2', '--size', '8', '--lr', '0.02', '--device', 'cpu']


class FrozenTrainer(Trainer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        freeze_batch_norm_2d(self.model)

    def fit(self, checkpoint: Path, *args: Any) -> Any:
        end = super().fit(checkpoint, *args)
        if self.machine.rank == 0:
            weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(weights, checkpoint.parent.parent / 'weights.safetensors')
        return end


def main(output: Path) -> int:
    with mock.patch.object(ablation, 'Trainer', FrozenTrainer):
        return ablation.main([*COMMAND, '--output', str(output)])


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
