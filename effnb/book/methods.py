"""The method index: what the package implements, where it is explained, and who published it.

It is generated: a method is a public function of a section's package that takes a model and gives
one back, or what holds one; `NAMES` adds others. Its name is read from the docstrings, and so is
the paper; the chapter is the one of the package's name. The README and the site show the same
table, and a test fails when the README's is old.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from effnb.book.site.reference import Module, Reference, Thing, page_of, read_reference
from effnb.lab.chapters import NOTEBOOKS, SECTIONS, TABLE

REPOSITORY = NOTEBOOKS.parent
BEGIN = "<!-- methods: written by `make notebooks`, do not edit -->"
END = "<!-- end of methods -->"
CHAPTERS = {
    **dict.fromkeys(
        (
            "effnb.finetuning.adapters",
            "effnb.finetuning.bitfit",
            "effnb.finetuning.black_box",
            "effnb.finetuning.diff_pruning",
            "effnb.finetuning.dora",
            "effnb.finetuning.ia3",
            "effnb.finetuning.intrinsic_dimension",
            "effnb.finetuning.intrinsic_prompt",
            "effnb.finetuning.last_layers",
            "effnb.finetuning.learned_masks",
            "effnb.finetuning.lora",
            "effnb.finetuning.prefix_tuning",
            "effnb.finetuning.prompt_tuning",
            "effnb.finetuning.selective_modules",
        ),
        "04_finetuning/1_delta_tuning",
    ),
    **dict.fromkeys(
        ("effnb.finetuning.optimal_control", "effnb.finetuning.serving"),
        "04_finetuning/2_delta_analysis",
    ),
    **dict.fromkeys(
        (
            "effnb.finetuning.contextual_calibration",
            "effnb.finetuning.instructions",
            "effnb.finetuning.mixing",
            "effnb.finetuning.prompting",
            "effnb.finetuning.t_few",
        ),
        "04_finetuning/3_multitask",
    ),
    "effnb.evaluation": "07_evaluation/1_evaluation",
}
"""Packages and modules whose chapter has another name than they."""
NAMES = {
    "effnb.design.attention.bigbird.bigbird_attention": "BigBird",
    "effnb.design.attention.entmax.entmax_attention": "Entmax attention",
    "effnb.design.attention.etc.EtcAttention": "ETC",
    "effnb.design.attention.flash_attention.flash_attention": "FlashAttention",
    "effnb.design.attention.grouped_query.grouped_query": "Grouped-query attention",
    "effnb.design.attention.linear_attention.linear_attention": "Linear attention",
    "effnb.design.attention.linformer.LinformerAttention": "Linformer",
    "effnb.design.attention.longformer.LongformerAttention": "Longformer",
    "effnb.design.attention.performer.performer_attention": "Performer (FAVOR+)",
    "effnb.design.attention.reformer.lsh_attention": "Reformer (LSH attention)",
    "effnb.design.attention.sliding_window.sliding_window": "Sliding window with sinks",
    "effnb.design.attention.sparsefinder.fit_projections": "Sparsefinder",
    "effnb.design.attention.streaming_llm.streaming_llm": "StreamingLLM",
    "effnb.design.attention.transformer_xl.TransformerXL": "Transformer-XL",
    "effnb.design.context.rope.rope_frequencies": "RoPE",
    "effnb.design.experts.balance.balance_loss": "Load balancing loss",
    "effnb.design.experts.decoder.upcycle": "Sparse upcycling",
    "effnb.design.experts.entmax_routing.entmax_routing": "Entmax routing (the workbook's own)",
    "effnb.design.experts.expert_choice.expert_choice": "Expert choice",
    "effnb.design.experts.switch.switch": "Switch routing",
    "effnb.design.experts.top2.glam": "GLaM (top-2 routing)",
    "effnb.design.experts.top2.gshard": "GShard (top-2 routing)",
    "effnb.design.retention.gla.GLALM": "Gated linear attention (GLA)",
    "effnb.design.retention.hyena.HyenaLM": "Hyena",
    "effnb.design.retention.retention.retention": "Retention",
    "effnb.design.retention.retnet.RetNetLM": "RetNet",
    "effnb.design.retention.rwkv.RWKVLM": "RWKV-4",
    "effnb.design.retrieval.knn_lm.KnnLm": "kNN-LM",
    "effnb.design.retrieval.retro.Retro": "RETRO",
    "effnb.design.sharing.adaptive_computation_time.adaptive_computation_time": (
        "Adaptive computation time (ACT)"
    ),
    "effnb.design.sharing.albert.share_layers": "Cross-layer sharing (ALBERT)",
    "effnb.design.sharing.factorized_embedding.factorize_embedding": "Factorized embedding",
    "effnb.design.sharing.perceiver.Perceiver": "Perceiver",
    "effnb.design.sharing.perceiver_io.PerceiverIO": "Perceiver IO",
    "effnb.design.sharing.sentence_order.sentence_order": "Sentence-order prediction",
    "effnb.design.sharing.universal_transformer.UniversalTransformer": "Universal Transformer",
    "effnb.finetuning.black_box.black_box": "Black-box tuning",
    "effnb.finetuning.intrinsic_prompt.learn_subspace": "Intrinsic prompt tuning",
    "effnb.finetuning.contextual_calibration.calibrate": "Contextual calibration",
    "effnb.finetuning.instructions.instruction_batches": "Instruction training (T0, FLAN)",
    "effnb.finetuning.mixing.mixing_rates": "Task mixing (T5)",
    "effnb.finetuning.optimal_control.successive_approximations": "Successive approximations",
    "effnb.finetuning.prompting.label_probabilities": "Prompting with verbalizers",
    "effnb.finetuning.serving.serve": "Many users in one batch (S-LoRA)",
    "effnb.finetuning.t_few.t_few_loss": "T-Few",
    "effnb.hardware.codesign.gshard.moe_layer": "GShard",
    "effnb.inference.adaptive_computation.branchynet.joint_loss": "BranchyNet",
    "effnb.inference.adaptive_computation.calm.generate": "CALM",
    "effnb.inference.adaptive_computation.calm.oracle_exit": "Oracle exit",
    "effnb.inference.adaptive_computation.cascades.cascade": "Cascades (Chow's rule)",
    "effnb.inference.adaptive_computation.deebert.ramp_loss": "DeeBERT",
    "effnb.inference.adaptive_computation.deferral.css_loss": "Learning to defer (CSS)",
    "effnb.inference.adaptive_computation.deferral.fit_rejector": "Post-hoc deferral",
    "effnb.inference.adaptive_computation.layerskip.self_speculative": "LayerSkip",
    "effnb.inference.adaptive_computation.layerskip.with_layer_dropout": "Layer dropout",
    "effnb.inference.adaptive_computation.learn_then_test.calibrate": "Learn-then-Test",
    "effnb.inference.adaptive_computation.mixture_of_depths.mixture_of_depths": "Mixture-of-Depths",
    "effnb.inference.adaptive_computation.pabee.by_patience": "PABEE",
    "effnb.inference.adaptive_computation.speculative.generate": "Speculative decoding",
    "effnb.inference.distillation.chain_of_thought.one_task": "Fine-tune-CoT",
    "effnb.inference.distillation.chain_of_thought.step_by_step": "Distilling step by step",
    "effnb.inference.distillation.deviations.deviations": "Student-teacher deviations",
    "effnb.inference.distillation.distilbert.distilbert": "DistilBERT",
    "effnb.inference.distillation.gkd.gkd": "GKD (on-policy, generalized JSD)",
    "effnb.inference.distillation.hinton.hinton": "Knowledge distillation (temperature)",
    "effnb.inference.distillation.in_context.context_distillation": "Context distillation",
    "effnb.inference.distillation.in_context.in_context": "In-context learning distillation",
    "effnb.inference.distillation.instructions.next_round": "Instruction distillation (Lion)",
    "effnb.inference.distillation.minillm.minillm": "MiniLLM (reverse KL)",
    "effnb.inference.distillation.minilm.minilm": "MiniLM",
    "effnb.inference.distillation.robust_active_distillation.robust_choice": (
        "Robust active distillation"
    ),
    "effnb.inference.distillation.sequence_level.sequence_level": "Sequence-level distillation",
    "effnb.inference.distillation.slam.slam_loss": "SLaM",
    "effnb.inference.distillation.supervision_complexity.supervision_complexity": (
        "Supervision complexity"
    ),
    "effnb.inference.distillation.teacher_guided_training.make_inputs": "Teacher-guided training",
    "effnb.inference.distillation.tinybert.tinybert": "TinyBERT",
    "effnb.inference.distillation.vocabularies.uld": "ULD (other vocabularies)",
    "effnb.inference.distillation.weighted_distillation.weighted_loss": "Weighted distillation",
    "effnb.inference.distillation.worst_class.worst_class": "Worst-class distillation",
    "effnb.inference.low_rank.losparse.losparse": "LoSparse",
    "effnb.inference.low_rank.losparse.low_rank_plus_sparse": "Low rank plus sparse",
    "effnb.inference.matryoshka.approximate.Hnsw": "HNSW",
    "effnb.inference.matryoshka.approximate.Ivf": "IVF",
    "effnb.inference.matryoshka.classification.MatryoshkaHeads": "MRL and MRL-E heads",
    "effnb.inference.matryoshka.classification.adaptive_classification": "Adaptive classification",
    "effnb.inference.matryoshka.losses.matryoshka_loss": "Matryoshka representation learning",
    "effnb.inference.matryoshka.retrieval.adaptive_retrieval": "Adaptive retrieval",
    "effnb.inference.matryoshka.retrieval.funnel": "Funnel retrieval",
    "effnb.inference.pruning.heads.prune_heads": "Head pruning",
    "effnb.inference.pruning.lora_prune.lora_prune": "LoRAPrune",
    "effnb.inference.pruning.lottery.lottery": "Lottery tickets",
    "effnb.inference.pruning.magnitude.gradual": "Gradual magnitude pruning",
    "effnb.inference.pruning.masks.apply_masks": "N:M sparsity",
    "effnb.inference.pruning.recovery.fine_tune": "Fine-tuning after pruning",
    "effnb.inference.pruning.taylor.taylor": "Taylor importance",
    "effnb.inference.pruning.width.width": "Width pruning (Minitron)",
    "effnb.inference.quantization.estimators.lsq_quantize": "LSQ",
    "effnb.inference.quantization.estimators.straight_through": "Straight-through estimator",
    "effnb.inference.quantization.extreme.binarize": "Binary weights",
    "effnb.inference.quantization.extreme.ternarize": "Ternary weights",
    "effnb.inference.quantization.fast.fast": "Packed int8 and int4 layers",
    "effnb.inference.quantization.llm_int8.llm_int8": "LLM.int8()",
    "effnb.inference.quantization.llm_qat.self_generate": "LLM-QAT",
    "effnb.inference.quantization.rotation.rotate": "Rotation (QuaRot)",
    "effnb.inference.quantization.sensitivity.hessian_sensitivity": "HAWQ sensitivity",
    "effnb.inference.quantization.tables.quantize_table": "NF4, FP4 and FP8 tables",
    "effnb.inference.retrieval_distillation.embed_distill.embed_distill": "EmbedDistill",
    "effnb.inference.retrieval_distillation.encoders.CrossEncoder": ("Dual-pooled cross-encoder"),
    "effnb.inference.retrieval_distillation.margin_mse.margin_mse": "MarginMSE",
    "effnb.inference.retrieval_distillation.order_only.order_only": (
        "Order-only margins (the workbook's own)"
    ),
    "effnb.inference.retrieval_distillation.pointwise.pointwise": "Pointwise score distillation",
    "effnb.inference.retrieval_distillation.softmax_kl.softmax_kl": (
        "Softmax divergence over documents"
    ),
    "effnb.inference.self_distilled_quantization.ipq.iterative_product_quantization": (
        "Iterative product quantization (iPQ)"
    ),
    "effnb.inference.self_distilled_quantization.product.product_quantize": "Product quantization",
    "effnb.inference.self_distilled_quantization.quant_noise.prepare_quant_noise": "Quant-Noise",
    "effnb.inference.self_distilled_quantization.sdq.sdq": "Self-distilled quantization (SDQ)",
    "effnb.pretraining.objectives.causal.causal_lm": "Causal language modelling (CLM)",
    "effnb.pretraining.objectives.chinchilla.chinchilla": "Chinchilla's rule",
    "effnb.pretraining.objectives.electra.Electra": "ELECTRA (replaced-token detection)",
    "effnb.pretraining.objectives.masked.masked_lm": "Masked language modelling (MLM)",
    "effnb.pretraining.objectives.prefix_lm.prefix_lm": "Prefix language modelling",
    "effnb.pretraining.objectives.span_corruption.span_corruption": "Span corruption (T5)",
}
"""What functions are searched for by, where the docstring does not begin with it or the function
does not take a whole model."""
_PAPER = re.compile(r'"(?P<title>[^"]+)"[^"]*?arXiv:?\s*(?P<id>\d{4}\.\d{4,5})', re.DOTALL)
_ARXIV = re.compile(r"arXiv:?\s*(\d{4}\.\d{4,5})")
_HEAD = re.compile(r"(?P<name>[^.:]{2,40}): ")


@dataclass(frozen=True)
class Method:
    """One row of the index.

    Attributes:
        name: As people search for it.
        function: Full dotted name, by the shortest package that passes it on.
        home: Full dotted name where it is defined.
        chapter: The chapter's path below `notebooks/`.
        papers: arXiv id of each source, with its title where the docstring gives one.
    """

    name: str
    function: str
    home: str
    chapter: str
    papers: dict[str, str]

    @property
    def section(self) -> str:
        """The section of the survey."""
        return SECTIONS[self.chapter.split("/")[0]]


def methods(reference: Reference | None = None) -> list[Method]:
    """All methods of the package, by section and chapter, then by name.

    Raises:
        ValueError: When a method belongs to no chapter; the sentence says where to name it.
    """
    reference = read_reference(REPOSITORY) if reference is None else reference
    sections = {key.split("_", 1)[1] for key in SECTIONS}
    found = []
    for module in reference.modules.values():
        parts = module.name.split(".")
        if parts[0] != "effnb" or len(parts) < 3 or parts[1] not in sections:
            continue
        giving = [
            thing
            for thing in module.things
            if f"{module.name}.{thing.name}" in NAMES or gives_a_model(thing, reference)
        ]
        named = {t.name: name for t in giving if (name := name_of(t, module))}
        head = _HEAD.match(module.doc)
        if giving and not named and head and _ARXIV.search(module.doc):
            named = {giving[0].name: head["name"]}  # its first one is what the module is about
        for thing in giving:
            if thing.name in named:
                full = f"{module.name}.{thing.name}"
                found.append(
                    Method(
                        named[thing.name],
                        f"{reference.shortest(full)}.{thing.name}",
                        full,
                        chapter_of(module.name),
                        papers_of(thing, module, reference, named[thing.name]),
                    )
                )
    order = list(TABLE)
    return sorted(found, key=lambda m: (order.index(m.chapter), m.name.lower(), m.function))


def gives_a_model(thing: Thing, reference: Reference) -> bool:
    """Whether a function takes a model first and returns a model, or what has one as a field."""
    if thing.kind != "function" or thing.arguments[:1] != ("model",):
        return False
    if not re.match(r"\(model: (?:nn\.)?(?:Module|Model|PreTrainedModel)\b", thing.signature):
        return False
    gives = thing.signature.rpartition(" -> ")[2]
    if re.fullmatch(r"(?:nn\.)?Module|Model|PreTrainedModel", gives):
        return True
    return any(
        "model" in other.arguments
        for module in reference.modules.values()
        for other in module.things
        if other.kind == "class" and other.name == gives
    )


def name_of(thing: Thing, module: Module) -> str | None:
    """What a method is called: the head of its module's docstring, or a word that is its name."""
    if (full := f"{module.name}.{thing.name}") in NAMES:
        return NAMES[full]
    key = _letters(thing.name)
    head = _HEAD.match(module.doc)
    if head and (module.name.endswith(f".{thing.name}") or _letters(head["name"]) == key):
        return head["name"]
    for text in (thing.doc, module.doc):
        for word in re.findall(r"[A-Z][\w.()-]*\w\)?", text):
            if _letters(word) == key:
                return word
    return None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def chapter_of(module: str) -> str:
    """The chapter that explains a module: that of its package's name.

    Raises:
        ValueError: When there is none.
    """
    for length in range(len(module.split(".")), 1, -1):
        if (part := ".".join(module.split(".")[:length])) in CHAPTERS:
            return CHAPTERS[part]
    section, topic = module.split(".")[1:3]
    for name in TABLE:
        folder, _, stem = name.partition("/")
        if folder.split("_", 1)[1] == section and stem.split("_", 1)[-1] == topic:
            return name
    raise ValueError(
        f"no chapter has the name of {module}: add it to CHAPTERS in effnb/book/methods.py."
    )


def papers_of(thing: Thing, module: Module, reference: Reference, name: str) -> dict[str, str]:
    """ArXiv ids and titles of a method's sources.

    They stand in its own docstring, or in that of its module, or else with its name in the title in
    that of a neighbour.
    """
    for text in (thing.doc, module.doc):
        titles = {m["id"]: _title(m["title"]) for m in _PAPER.finditer(text)}
        if _ARXIV.search(text):
            return {one: titles.get(one, "") for one in _ARXIV.findall(text)}
    package = module.name.rpartition(".")[0]
    return {
        m["id"]: _title(m["title"])
        for other in reference.modules.values()
        if other.name.startswith(f"{package}.")
        for m in _PAPER.finditer(other.doc)
        if name in m["title"]
    }


def _title(found: str) -> str:
    return " ".join(found.split()).rstrip(",.")


# ---------------------------------------------------------------------------------- the tables


def _links(papers: dict[str, str]) -> Iterator[str]:
    for one, title in papers.items():
        said = f' "{title}"' if title else ""
        yield f"[{one}](https://arxiv.org/abs/{one}{said})"


def table(found: list[Method] | None = None, prefix: str = "notebooks/") -> str:
    """The index as a Markdown table for the README.

    Args:
        found: The methods; all of the package when None.
        prefix: Path from the page to the notebooks.
    """
    found = methods() if found is None else found
    lines = ["| method | function | chapter | section | paper |", "|---|---|---|---|---|"]
    for method in found:
        title = TABLE[method.chapter][0]
        written = (NOTEBOOKS / f"{method.chapter}.ipynb").is_file()
        chapter = f"[{title}]({prefix}{method.chapter}.ipynb)" if written else title
        papers = ", ".join(_links(method.papers))
        lines.append(
            f"| {method.name} | `{method.function}` | {chapter} | {method.section} | {papers} |"
        )
    return "\n".join(lines)


def page(reference: Reference, written: set[str]) -> str:
    """The index as an HTML table for the site.

    Args:
        reference: The public objects of the package, whose pages are linked.
        written: Names of the chapters that have a page.
    """
    rows = []
    for method in methods(reference):
        place = f"{page_of(method.home.rpartition('.')[0])}.html#{method.home}"
        title = html.escape(TABLE[method.chapter][0])
        chapter = (
            f'<a href="{method.chapter}.html">{title}</a>' if method.chapter in written else title
        )
        papers = ", ".join(
            f'<a href="https://arxiv.org/abs/{one}">{html.escape(said) or one}</a>'
            for one, said in method.papers.items()
        )
        rows.append(
            f'<tr><th scope="row">{html.escape(method.name)}</th>'
            f'<td><a href="{place}"><code>{breakable(method.function)}</code></a></td>'
            f"<td>{chapter}</td><td>{method.section}</td><td>{papers}</td></tr>"
        )
    heads = ("Method", "Function", "Chapter", "Section", "Paper")
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    return (
        f'<table class="method-index"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def breakable(name: str) -> str:
    """A dotted name as HTML that may break after a dot or an underscore, and nowhere else."""
    return re.sub(r"(?<=[a-z\d])([._])(?=[a-zA-Z\d])", r"\1<wbr>", name)


def readme_with_index(text: str, found: list[Method] | None = None) -> str:
    """The README's text with the index as it is now.

    Raises:
        ValueError: When the README has lost the two comments around the index.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README needs the lines {BEGIN!r} and {END!r} around its index.")
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}"


def update_readme(readme: Path) -> bool:
    """Renew the index in the README; returns whether it changed.

    Raises:
        ValueError: When the README has lost the two comments around the index.
    """
    text = readme.read_text(encoding="utf-8")
    renewed = readme_with_index(text)
    if renewed != text:
        readme.write_text(renewed, encoding="utf-8", newline="\n")
    return renewed != text
