"""The networks compute the same as the authors' MXNet code (`tests/helpers/authors_networks.py`)."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from authors_networks import CASES, Case, build, draw, error

from timm_atac.weights.names import FIXED, open_atac_names

# Largest differences: for logits and loss relative to the largest value of the reference, for a gradient's norm
# relative to it, and for the sum of a running mean absolute. Our networks run in float64, so the differences are the
# same on every machine and come from rounding in the reference. The gradients of ImageNet networks have the largest.
LOGITS = 5e-5
LOSS = 1e-5
MEANS = 1e-4
GRADIENTS = {'cifar': 1e-4, 'imagenet': 1.1e-2}
# A gradient that is zero except for rounding (of a bias before a norm) must be below this share of the largest one.
ZERO_GRADIENT = 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=str)
def test_parity(case: Case) -> None:
    model = build(case).double()
    names = open_atac_names(model)
    shapes = json.loads(str(case['param_shapes']))
    assert set(names.values()) | (set(FIXED) if case.net == 'cifar' else set()) == set(shapes)
    assert sum(p.numel() for p in model.parameters()) == case['num_params']

    seed: int = case.options['seed']
    batch: int = case.options.get('batch', 4)
    size: int = case.options.get('size', 32 if case.net == 'cifar' else 224)
    state = model.state_dict()
    for ours, theirs in names.items():
        assert list(state[ours].shape) == shapes[theirs]
        state[ours].copy_(draw(theirs, shapes[theirs], seed))
    x = torch.from_numpy(
        np.random.RandomState(seed).standard_normal((batch, 3, size, size)).astype(np.float32)
    ).double()

    # one training step
    logits = model.train()(x)
    loss = F.cross_entropy(logits, torch.arange(batch) % logits.shape[1])
    loss.backward()
    errors = {
        'train logits': (error(logits.detach(), case['train_logits']), LOGITS),
        'train loss': (error(loss.detach(), case['train_loss']), LOSS),
    }
    theirs_grad = dict(zip(case['grad_names'], case['grad_norms'], strict=True))
    ours_grad = {names[k]: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}
    assert set(ours_grad) == set(theirs_grad)
    floor = ZERO_GRADIENT * max(theirs_grad.values())
    errors['gradient norms'] = (
        max(abs(ours_grad[k] - v) / v for k, v in theirs_grad.items() if v > floor),
        GRADIENTS[case.net],
    )
    assert all(ours_grad[k] <= floor for k, v in theirs_grad.items() if v <= floor)
    sums = {n: state[k].sum().item() for k, n in names.items()}
    means = [k for k in case['stat_names'] if k.endswith('running_mean')]
    theirs_sums = dict(zip(case['stat_names'], case['stat_sums'], strict=True))
    errors['running means'] = (max(abs(sums[k] - theirs_sums[k]) for k in means), MEANS)

    # inference with the statistics of the reference
    ours_of = {theirs: ours for ours, theirs in names.items()}
    values = case['eval_stat_values']
    for name in case['eval_stat_names']:
        size_of = int(np.prod(shapes[name]))
        state[ours_of[name]].copy_(torch.from_numpy(values[:size_of].reshape(shapes[name])))
        values = values[size_of:]
    assert len(values) == 0
    with torch.inference_mode():
        errors['eval logits'] = (error(model.eval()(x), case['eval_logits']), LOGITS)

    report = ', '.join(f'{what} {found:.1e}' for what, (found, _) in errors.items())
    print(f'{case}: {report}')
    assert all(found <= allowed for found, allowed in errors.values()), report


@pytest.mark.slow
def test_names_one_to_one() -> None:
    names = open_atac_names(timm.create_model('atac_resnet50'))
    assert len(set(names.values())) == len(names)
    assert names['layer3.0.act1.conv2.weight'] == 'layer3.0.relu1.module.3.weight'


def test_names_of_what_the_authors_lack() -> None:
    with pytest.raises(ValueError, match=r'stages\.0\.0\.attn.* no counterpart'):
        open_atac_names(timm.create_model('resnet8_cifar', attn_layer='local_se'))
    with pytest.raises(ValueError, match='Linear: expected one of'):
        open_atac_names(nn.Linear(1, 1))
