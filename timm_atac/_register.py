"""Registration with timm: what runs once `timm.models` has loaded."""

import warnings

from . import _timm

MIN_TIMM = '1.0.21'  # pyproject.toml says the same; a test compares


def register() -> None:
    """Make the networks and activations of this package known to timm: all of them or, with an error, none.

    Raises:
        RuntimeError: timm is older than `MIN_TIMM`, or a name is taken.
        Exception: Whatever importing the package's modules raises.
    """
    if _release(_timm.__version__) < _release(MIN_TIMM):
        raise RuntimeError(f'timm {_timm.__version__} is older than {MIN_TIMM}')
    before = _timm.Snapshot()
    try:
        with warnings.catch_warnings():
            # timm overwrites a registered name with no more than this warning
            warnings.filterwarnings('error', message='Overwriting .* in registry')
            from . import atac_resnet, cifar_resnet, layers  # noqa: F401  (their entry functions register themselves)
        _timm.add_act_layer('atac', layers.ATAC)
        _timm.add_act_layer('se_act', layers.SEActivation)
        _timm.add_act_layer('nin', layers.NiN)
    except BaseException as error:
        before.restore()
        if isinstance(error, UserWarning):
            raise RuntimeError(f'a model name is taken: {error}') from error
        raise


def _release(version: str) -> tuple:
    """The leading numbers of a version: '1.0.21.dev0' -> (1, 0, 21)."""
    numbers = []
    for part in version.split('.'):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
