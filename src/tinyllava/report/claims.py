"""What the text of section 4.2 says that Figures 4 to 8 show, as claims that a report can test.

Paper: sections 4.2.1 and 4.2.2. Each claim is one sentence of the paper in our own words, with the two sides
of the comparison; "significantly" and "slightly" are left to the intervals.
"""

from collections.abc import Mapping

from tinyllava.report.study import Claim


def _claims(source: str, axis: str, *rows: tuple[str, str, str, str, Mapping[str, str]]) -> tuple[Claim, ...]:
    """Build claims on one axis from (text, better, worse, benchmark, other labels)."""
    return tuple(
        Claim(
            text=text,
            source=source,
            better={axis: better, **others},
            worse={axis: worse, **others},
            benchmark=benchmark,
        )
        for text, better, worse, benchmark, others in rows
    )


_TL, _SLM, _PHI = ({"language_model": name} for name in ("TinyLlama", "StableLM-2", "Phi-2"))

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "figure-4": _claims(
        "section 4.2.1, ablation of small-scale LLMs",
        "language_model",
        ("Phi-2 does better than TinyLlama on every benchmark.", "Phi-2", "TinyLlama", "", {}),
        ("Phi-2 does better than StableLM-2 on every benchmark.", "Phi-2", "StableLM-2", "", {}),
        ("Phi-2 is far ahead of TinyLlama on ScienceQA.", "Phi-2", "TinyLlama", "scienceqa", {}),
        ("Phi-2 is far ahead of StableLM-2 on ScienceQA.", "Phi-2", "StableLM-2", "scienceqa", {}),
        ("TinyLlama, the smallest, is slightly behind StableLM-2.", "StableLM-2", "TinyLlama", "", {}),
        ("On POPE, TinyLlama is ahead of StableLM-2.", "TinyLlama", "StableLM-2", "pope", {}),
    ),
    "figure-5": _claims(
        "section 4.2.1, ablation of vision encoders",
        "vision_encoder",
        ("SigLIP does better than CLIP.", "SigLIP", "CLIP", "", {}),
        ("SigLIP is well ahead of CLIP on TextVQA.", "SigLIP", "CLIP", "textvqa", {}),
        ("SigLIP is well ahead of CLIP on LLaVA-W.", "SigLIP", "CLIP", "llava-w", {}),
    ),
    "figure-6": _claims(
        "section 4.2.1, preliminary exploration of connectors",
        "connector",
        (
            "With about as many parameters, the MLP does better than the resampler.",
            "MLP",
            "Resampler",
            "",
            {},
        ),
    ),
    "figure-7": _claims(
        "section 4.2.2, ablation of data mixtures",
        "data",
        ("With TinyLlama, ShareGPT4V is better than LLaVA-1.5 overall.", "ShareGPT4V", "LLaVA-1.5", "", _TL),
        ("With TinyLlama, ShareGPT4V costs accuracy on POPE.", "LLaVA-1.5", "ShareGPT4V", "pope", _TL),
        ("With StableLM-2, ShareGPT4V is better on every benchmark.", "ShareGPT4V", "LLaVA-1.5", "", _SLM),
        ("With Phi-2, ShareGPT4V is better on every benchmark.", "ShareGPT4V", "LLaVA-1.5", "", _PHI),
    ),
    "figure-8": _claims(
        "section 4.2.2, ablation of training recipes",
        "recipe",
        ("On ShareGPT4V, share does better than base with every language model.", "share", "base", "", {}),
        ("With StableLM-2, share hallucinates more: POPE falls.", "base", "share", "pope", _SLM),
        ("With Phi-2, share hallucinates more: POPE falls.", "base", "share", "pope", _PHI),
        ("With TinyLlama, share does better on POPE as well.", "share", "base", "pope", _TL),
    ),
}
"""Grid -> its claims. Labels are the names of Table 1, the connectors, the data sets and the recipes."""
