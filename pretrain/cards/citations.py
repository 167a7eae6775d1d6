"""BibTeX of a run and of the papers that its parts follow.

What lives here: the papers, and which part follows which. What must not: prose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.cards.facts import Facts


@dataclass(frozen=True)
class Paper:
    """A paper; without an arXiv number it names where it is found."""

    key: str
    authors: str
    title: str
    year: int
    arxiv: str | None = None
    where: str | None = None

    def bibtex(self) -> str:
        """Its entry."""
        lines = [f"author = {{{self.authors}}}", f"title = {{{{{self.title}}}}}", f"year = {{{self.year}}}"]
        if self.arxiv is not None:
            lines += ["journal = {arXiv preprint}", f"eprint = {{{self.arxiv}}}", "archivePrefix = {arXiv}"]
        if self.where is not None:
            lines.append(f"howpublished = {{{self.where}}}")
        kind = "article" if self.arxiv is not None else "misc"
        return f"@{kind}{{{self.key},\n  " + ",\n  ".join(lines) + "\n}"


_BERT = Paper(
    "devlin2018bert",
    "Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina",
    "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    2018,
    "1810.04805",
)
_ELECTRA = Paper(
    "clark2020electra",
    "Clark, Kevin and Luong, Minh-Thang and Le, Quoc V. and Manning, Christopher D.",
    "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
    2020,
    "2003.10555",
)
_T5 = Paper(
    "raffel2019t5",
    "Raffel, Colin and Shazeer, Noam and Roberts, Adam and Lee, Katherine and Narang, Sharan and Matena, Michael and "
    "Zhou, Yanqi and Li, Wei and Liu, Peter J.",
    "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    2019,
    "1910.10683",
)
_TRANSFORMER = Paper(
    "vaswani2017attention",
    "Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and Gomez, Aidan N. and "
    "Kaiser, Lukasz and Polosukhin, Illia",
    "Attention Is All You Need",
    2017,
    "1706.03762",
)
ARCHITECTURES: Mapping[str, Paper] = {
    "bert": _BERT,
    "electra": _ELECTRA,
    "t5": _T5,
    "transformer": _TRANSFORMER,
    "marian": _TRANSFORMER,
    "roberta": Paper(
        "liu2019roberta",
        "Liu, Yinhan and Ott, Myle and Goyal, Naman and Du, Jingfei and Joshi, Mandar and Chen, Danqi and Levy, Omer "
        "and Lewis, Mike and Zettlemoyer, Luke and Stoyanov, Veselin",
        "RoBERTa: A Robustly Optimized BERT Pretraining Approach",
        2019,
        "1907.11692",
    ),
    "albert": Paper(
        "lan2019albert",
        "Lan, Zhenzhong and Chen, Mingda and Goodman, Sebastian and Gimpel, Kevin and Sharma, Piyush and Soricut, Radu",
        "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
        2019,
        "1909.11942",
    ),
    "modernbert": Paper(
        "warner2024modernbert",
        "Warner, Benjamin and others",
        "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast, Memory Efficient, and Long Context "
        "Finetuning and Inference",
        2024,
        "2412.13663",
    ),
    "modernbert-decoder": Paper(
        "weller2025ettin",
        "Weller, Orion and others",
        "Seq vs Seq: An Open Suite of Paired Encoders and Decoders",
        2025,
        "2507.11412",
    ),
    "eurobert": Paper(
        "boizard2025eurobert",
        "Boizard, Nicolas and others",
        "EuroBERT: Scaling Multilingual Encoders for European Languages",
        2025,
        "2503.05500",
    ),
    "gpt2": Paper(
        "radford2019gpt2",
        "Radford, Alec and Wu, Jeffrey and Child, Rewon and Luan, David and Amodei, Dario and Sutskever, Ilya",
        "Language Models are Unsupervised Multitask Learners",
        2019,
        where="OpenAI",
    ),
    "llama": Paper(
        "touvron2023llama",
        "Touvron, Hugo and others",
        "LLaMA: Open and Efficient Foundation Language Models",
        2023,
        "2302.13971",
    ),
    "qwen3": Paper("yang2025qwen3", "Yang, An and others", "Qwen3 Technical Report", 2025, "2505.09388"),
}
OPTIMIZERS: Mapping[str, Paper] = {
    "adamw": Paper(
        "loshchilov2017adamw",
        "Loshchilov, Ilya and Hutter, Frank",
        "Decoupled Weight Decay Regularization",
        2017,
        "1711.05101",
    ),
    "stable-adamw": Paper(
        "wortsman2023stable",
        "Wortsman, Mitchell and others",
        "Stable and low-precision training for large-scale vision-language models",
        2023,
        "2304.13013",
    ),
    "muon": Paper(
        "jordan2024muon",
        "Jordan, Keller and others",
        "Muon: An optimizer for hidden layers in neural networks",
        2024,
        where="https://kellerjordan.github.io/posts/muon",
    ),
}
LORA = Paper(
    "hu2021lora",
    "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and "
    "Wang, Lu and Chen, Weizhu",
    "LoRA: Low-Rank Adaptation of Large Language Models",
    2021,
    "2106.09685",
)
SENTENCES = Paper(
    "reimers2019sentence",
    "Reimers, Nils and Gurevych, Iryna",
    "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
    2019,
    "1908.10084",
)
SCHEDULES: Mapping[str, Paper] = {
    "wsd": Paper(
        "hagele2024scaling",
        "Hägele, Alexander and Bakouch, Elie and Kosson, Atli and Ben Allal, Loubna and Von Werra, Leandro and Jaggi, "
        "Martin",
        "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
        2024,
        "2405.18392",
    ),
    "inverse-sqrt": _TRANSFORMER,
}
OBJECTIVES: Mapping[str, Paper] = {
    "mlm": _BERT,
    "rtd": _ELECTRA,
    "span-corruption": _T5,
    "translation": _TRANSFORMER,
}


def papers(facts: Facts) -> list[Paper]:
    """The papers behind architecture, objective, optimizer and schedule, each once."""
    found: list[Paper | None] = []
    stock = str(facts.model.config.get("model_type", ""))
    if facts.run is not None:
        design = facts.run.section("model").get("architecture")
        found.append(ARCHITECTURES.get(str(design)) or ARCHITECTURES.get(stock))
        found.append(OBJECTIVES.get(str(facts.objective)))
        found.append(OPTIMIZERS.get(str(facts.run.section("optimizer").get("name"))))
        found.append(SCHEDULES.get(str(facts.run.section("schedule").get("kind"))))
    elif facts.tuning is not None:
        settings = facts.tuning.settings
        found.append(ARCHITECTURES.get(stock))
        found.append(OPTIMIZERS.get(str((settings.get("optimizer") or {}).get("name"))))
        found.append(SCHEDULES.get(str((settings.get("schedule") or {}).get("kind"))))
        found += [LORA if facts.tuning.lora is not None else None, SENTENCES if facts.model.sentences else None]
    else:
        found.append(ARCHITECTURES.get(stock))
    return list({paper.key: paper for paper in found if paper is not None}.values())


def own_entry(facts: Facts) -> str:
    """The entry of the model itself; nobody's name is known, so none is given."""
    key = re.sub(r"[^A-Za-z0-9-]+", "-", facts.title).strip("-").lower() or "model"
    lines = [f"title = {{{{{re.sub(r'[{}]', '', facts.title)}}}}}"]
    last = str(facts.run.starts[-1].get("time", "")) if facts.run is not None and facts.run.starts else ""
    if facts.tuning is not None:
        last = str(facts.tuning.result.get("finished", ""))
    if re.match(r"\d{4}-", last):
        lines.append(f"year = {{{last[:4]}}}")
    if facts.repository is not None:
        lines.append(f"howpublished = {{https://huggingface.co/{facts.repository}}}")
    lines.append(f"note = {{{_made_with(facts)}}}")
    return f"@misc{{{key},\n  " + ",\n  ".join(lines) + "\n}"


def _made_with(facts: Facts) -> str:
    if facts.tuning is not None:
        made = (facts.tuning.result.get("versions") or {}).get("pretrain")
        return "Fine-tuned with pretrain" + (f" {made}" if made else "")
    version = None if facts.run is None else facts.run.code_version
    identity = "" if facts.run is None else str(facts.run.progress.get("run_id", ""))
    said = "Made with pretrain" + (f" {version}" if version else "") if facts.run is not None else "A language model"
    return said + (f", run {identity}" if identity else "")
