"""The ids of licences that the Hugging Face Hub accepts in a model card.

Source: https://huggingface.co/docs/hub/repositories-licenses
"""

from typing import Any

from ..utils.words import did_you_mean

__all__ = ['LICENSES', 'license_problem']

LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
    lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa
    odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
""".split()
)


def license_problem(license: Any, license_name: Any = None) -> str | None:
    """Return why the Hub would refuse the licence of a card, None if it accepts it.

    Args:
        license: An id, a list of ids, or None for no licence.
        license_name: Name of a licence that has no id. Its id is 'other'.
    """
    for name in license if isinstance(license, list) else [license]:
        if name is not None and name not in LICENSES:
            hint = did_you_mean(str(name), LICENSES)
            expected = "an id of https://huggingface.co/docs/hub/repositories-licenses, or 'other' with license_name"
            return f'the licence {name!r} is not known to the Hub; {f"{hint} " if hint else ""}Expected {expected}'
        if name == 'other' and not license_name:
            return "the licence 'other' needs license_name, and should have license_link"
    return None
