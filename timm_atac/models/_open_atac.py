"""Loading of the authors' `.params` files, for the networks that the authors published code of."""

__all__ = ['OpenAtacWeights']


class OpenAtacWeights:
    """Mixin for networks that can load the `.params` files of the paper's authors.

    Attributes:
        open_atac_layout: Table of parameter names in `timm_atac.weights.names`, 'cifar' or 'imagenet'.
    """

    open_atac_layout: str

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load a `.params` file of the authors. timm calls this for a `pretrained_cfg` with `custom_load`.

        Args:
            checkpoint_path: The file.
            prefix: Part of timm's signature; it has no effect.

        Raises:
            ValueError: As in `timm_atac.weights.pretrained.load_pretrained`; the model is unchanged.
        """
        from ..weights.pretrained import load_pretrained  # not needed until weights are loaded

        load_pretrained(self, checkpoint_path)
