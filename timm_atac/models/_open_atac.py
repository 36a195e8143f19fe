"""What the networks of the paper's authors share: they load the authors' `.params` files."""

__all__ = ['OpenAtacWeights']


class OpenAtacWeights:
    """Mixin of the networks that the paper's authors have published code of.

    Attributes:
        open_atac_layout: Which table of `timm_atac.weights.names` the network's names are in, 'cifar' or 'imagenet'.
    """

    open_atac_layout: str

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load a `.params` file of the authors': timm calls it for a pretrained cfg with `custom_load`.

        Args:
            checkpoint_path: The file.
            prefix: Of timm's signature, without a meaning here.

        Raises:
            ValueError: As `timm_atac.weights.pretrained.load_pretrained`; the model stays as it was.
        """
        from ..weights.pretrained import load_pretrained  # when weights are asked for, not when timm is imported

        load_pretrained(self, checkpoint_path)
