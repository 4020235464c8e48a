"""What the text of section 4.2 says that its figures and tables show, as claims that a report can test.

Paper: sections 4.2.1 to 4.2.3 and appendix B. Each claim is one sentence of the paper in our own words, with
the two sides of the comparison; "significantly" and "slightly" are left to the intervals. Where two sides are
called comparable, the smaller model may be behind by ``COMPARABLE`` points; the paper gives no number for it,
nor does it name the pairs of variants, which are chosen here.
"""

from collections.abc import Mapping

from tinyllava.studies.study import Claim


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


COMPARABLE = 1.0
"""Points of a benchmark."""
_TL, _SLM, _PHI = ({"language_model": name} for name in ("TinyLlama", "StableLM-2", "Phi-2"))
_BASE = {"recipe": "base", "data": "LLaVA-1.5"}
_SHARE = {"recipe": "share", "data": "ShareGPT4V"}
_BEST = {"recipe": "share", "vision_encoder": "SigLIP", "language_model": "Phi-2"}
_OTHERS = "section 4.2.3, comparison with other LMMs"
_MOE = "MoE-LLaVA, 3.9B, 384 px"
_BEST_THAN_LLAVA = Claim(
    text="TinyLLaVA-share-Sig-Phi (3.1B) does better than LLaVA-1.5 (7B) on every benchmark.",
    source=_OTHERS,
    better=_BEST,
    rival="LLaVA-1.5, 7B, 336 px",
)


def _comparable(smaller: str, larger: str, text: str) -> Claim:
    """Build the claim that a smaller language model with the better data, recipe and encoder is on a par."""
    return Claim(
        text=f"With better data, recipe and encoder, a smaller variant is comparable to a larger: {text}.",
        source="section 4.2.3, comparison among variants",
        better={**_SHARE, "vision_encoder": "SigLIP", "language_model": smaller},
        worse={**_BASE, "vision_encoder": "CLIP", "language_model": larger},
        margin=COMPARABLE,
    )


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
    "table-a1": (
        *_claims(
            "appendix B",
            "language_model",
            ("A larger language model does better: Phi-2 than StableLM-2.", "Phi-2", "StableLM-2", "", {}),
            ("A larger language model does better: Phi-2 than TinyLlama.", "Phi-2", "TinyLlama", "", {}),
            ("StableLM-2, too, does better than TinyLlama.", "StableLM-2", "TinyLlama", "", {}),
        ),
        Claim(
            text="More diverse data with the recipe made for it do better: share on ShareGPT4V than base on "
            "LLaVA-1.5.",
            source="appendix B",
            better=_SHARE,
            worse=_BASE,
        ),
        _comparable("StableLM-2", "Phi-2", "share-Sig-SLM (2.0B) to base-C-Phi (3.0B)"),
        _comparable("TinyLlama", "StableLM-2", "share-Sig-TL (1.5B) to base-C-SLM (1.9B)"),
    ),
    "figure-9": (_comparable("TinyLlama", "Phi-2", "share-Sig-TL (1.5B) to base-C-Phi (3.0B)"),),
    "table-3": (
        _BEST_THAN_LLAVA,
        Claim(
            text="TinyLLaVA-share-Sig-Phi (3.1B) does better overall than Qwen-VL (7B).",
            source="section 4.2.3, summary",
            better=_BEST,
            rival="Qwen-VL, 7B, 448 px",
        ),
        Claim(
            text="On VQAv2, TinyLLaVA-share-Sig-Phi (3.1B) is comparable to MoE-LLaVA (3.9B).",
            source=_OTHERS,
            better=_BEST,
            rival=_MOE,
            benchmark="vqav2",
            margin=COMPARABLE,
        ),
        Claim(
            text="On POPE, TinyLLaVA-share-Sig-Phi (3.1B) is ahead of MoE-LLaVA (3.9B).",
            source=_OTHERS,
            better=_BEST,
            rival=_MOE,
            benchmark="pope",
        ),
    ),
    "figure-1": (_BEST_THAN_LLAVA,),
}
"""Grid -> its claims. Labels are the names of Table 1, the connectors, the data sets and the recipes."""
