"""Rewards and metrics that hold a model, with small random models made here, against plain one-by-one computations."""

import json
import math
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

import rewards
from datapools import Sample, UsageError
from rewards import make_metric, make_metrics, make_reward, make_rewards, measure, score_texts

GOLDEN = json.loads((Path(__file__).parent / "golden_rewards.json").read_text())
PROMPTS = ["how was it? ", "the long prompt " * 12, "", "so? "]
TEXTS = ["it was a fine film, really.", "no.", "", "the end came late and nobody cared about the dog at all. " * 3]
REFERENCES = [
    ["it was a good film."],
    ["no", "yes, it is so."],
    ["nothing", ""],
    ["a dog, a cat.", "the end came late."],
]
METAS = [{"intent": 1, "concepts": ["film", "dog"]}] * 2 + [{"intent": 3, "concepts": ["dog", "End"]}] * 2
BATCH = (PROMPTS, TEXTS, REFERENCES, METAS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_models.save_bert(root / "four", ["inform", "question", "directive", "commissive"])
    tiny_models.save_bert(root / "one", ["score"])
    tiny_models.save_bert(root / "nli", ["contradiction", "neutral", "entailment"])
    tiny_models.save_roberta(root / "roberta")
    tiny_models.save_t5(root / "t5")
    return root


@torch.no_grad()
def logits_one_by_one(path, texts, pairs=None, length=64, side="right"):
    tokenizer = AutoTokenizer.from_pretrained(path, truncation_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = []
    for i, text in enumerate(texts):
        second = None if pairs is None else [pairs[i]]
        encoded = tokenizer([text], second, return_tensors="pt", truncation=True, max_length=length)
        rows.append(model(**encoded).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize("name, length", [("four", 64), ("roberta", 64)])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sentiment(folder, name, length, include_prompt, batch_size):
    path = str(folder / name)
    reward = make_reward("sentiment", model=path, label_ix=1, include_prompt=include_prompt, batch_size=batch_size)
    texts = [prompt + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)] if include_prompt else TEXTS
    expected = logits_one_by_one(path, texts, length=length, side="left").softmax(dim=1)[:, 1]
    assert reward(*BATCH) == pytest.approx(expected.tolist(), abs=1e-5)
    metric = make_metric("sentiment", model=path, include_prompt=include_prompt)(*BATCH)
    assert metric["sentiment"][1] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_sentiment_keeps_the_end_of_a_long_text(folder):
    reward = make_reward("sentiment", model=str(folder / "four"))
    long = "one two three four five " * 20
    scores = reward([long, "six " + long, long], ["the end", "the end", "an end"], [[]] * 3, [{}] * 3)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0] != pytest.approx(scores[2], abs=1e-6)


def test_one_output_is_no_probability(folder):
    for name in ("sentiment", "classifier"):
        with pytest.raises(UsageError, match="has one output, a score and no probability; take reward_model") as error:
            make_reward(name, model=str(folder / "one"))
        assert "\n" not in str(error.value)
    (logit,) = make_reward("classifier", model=str(folder / "one"), label=0, logit=True)(["p "], ["a"], [[]], [{}])
    assert logit == pytest.approx(logits_one_by_one(str(folder / "one"), ["p a"])[0, 0].item(), abs=1e-5)


def test_classifier(folder, tmp_path):
    path = str(folder / "four")
    texts = [prompt + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    logits = logits_one_by_one(path, texts, side="left")
    for options, expected in (
        ({"label": 2}, logits.softmax(1)[:, 2]),
        ({"label": "commissive"}, logits.softmax(1)[:, 3]),
        ({"label": "inform", "logit": True}, logits[:, 0]),
        ({"label": 0, "max_length": 9}, logits_one_by_one(path, texts, length=9, side="left").softmax(1)[:, 0]),
    ):
        assert make_reward("classifier", model=path, **options)(*BATCH) == pytest.approx(expected.tolist(), abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.config.problem_type = "multi_label_classification"  # then each label has a probability of its own
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path)
    got = make_reward("classifier", model=str(tmp_path), label="question")(*BATCH)
    assert got == pytest.approx(logits.sigmoid()[:, 1].tolist(), abs=1e-5)
    assert make_metric("classifier", model=path, label=2)(*BATCH)["classifier"][1] == pytest.approx(
        logits.softmax(1)[:, 2].mean().item(), abs=1e-5
    )
    with pytest.raises(UsageError, match="has no label 'comissive'.*did you mean 'commissive'.*inform"):
        make_reward("classifier", model=path, label="comissive")
    with pytest.raises(UsageError, match="needs a value for its option 'model'"):
        make_reward("classifier")
    with pytest.raises(UsageError, match="max_length must be at least 1, not 0"):
        make_reward("classifier", model=path, max_length=0)


def test_an_encoder_decoders_response_needs_a_space(folder):
    """A response without a space of its own is joined to the prompt with the policy's separator."""
    path, prompts, texts = str(folder / "four"), ["say", "say ", "say"], ["cat", "cat", " cat"]
    batch = (prompts, texts, [[]] * 3, [{"intent": 1}] * 3)
    (whole,) = logits_one_by_one(path, ["say cat"]).softmax(1)[:, 1].tolist()
    assert make_reward("sentiment", model=path, separator=" ")(*batch) == pytest.approx([whole] * 3, abs=1e-5)
    glued = make_reward("sentiment", model=path, separator="")(*batch)
    assert glued[1:] == pytest.approx([whole] * 2, abs=1e-5) and glued[0] != pytest.approx(whole, abs=1e-5)
    samples = [Sample("s", "say", ["cat"], {})]
    for separator, same in ((" ", True), ("", False)):
        options = {"model": path, "label": "1"}
        (reward,) = make_rewards(("classifier",), options, {}, samples, byte_tokenizer, "cpu", separator).values()
        assert (reward(["say"], ["cat"], [[]], [{}])[0] == pytest.approx(whole, abs=1e-5)) is same


def test_the_intent_of_an_encoder_decoders_response(folder, monkeypatch):
    read = []
    monkeypatch.setattr(rewards, "classify", lambda *args: read.append(args[-1]) or torch.zeros(len(args[-1]), 4))
    for separator in (" ", ""):
        metric = make_metric("intent", model=str(folder / "four"), separator=separator)
        metric(["a<EOU>how?<EOU>", "how? <EOU>"], ["fine", "fine"], [[]] * 2, [{"intent": 1}] * 2)
    assert read == [["how? fine", "how? fine"], ["how?fine", "how? fine"]]


def byte_tokenizer(text, add_special_tokens=True):
    return tiny_models.byte_tokenizer(text)


# ---- reward models --------------------------------------------------------------------------------------------------
TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</{{ m.role[0] }}>{% endfor %}"


def test_reward_model(folder):
    path = str(folder / "one")
    texts = [f"{prompt}{text}" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    logits = logits_one_by_one(path, texts, side="left")[:, 0]
    assert logits.min() < 0 and (logits.max() - logits.min()) > 0.1  # raw, and different
    for size in (1, 3, 16):
        assert make_reward("reward_model", model=path, batch_size=size)(*BATCH) == pytest.approx(
            logits.tolist(), abs=1e-5
        )
    centred = make_reward("reward_model", model=path, center=0.25)(*BATCH)
    assert centred == pytest.approx((logits - 0.25).tolist(), abs=1e-5)
    middle = logits.median().item()
    clipped = make_reward("reward_model", model=path, center=middle, clip=0.05)(*BATCH)
    assert clipped == pytest.approx((logits - middle).clamp(-0.05, 0.05).tolist(), abs=1e-5)
    assert {-0.05, 0.05} & set(np.round(clipped, 6))
    short = logits_one_by_one(path, texts, length=11, side="left")[:, 0].tolist()
    assert make_reward("reward_model", model=path, max_length=11)(*BATCH) == pytest.approx(short, abs=1e-5)
    spaced = make_reward("reward_model", model=path, separator=" ")(["say:"], ["cat"], [[]], [{}])
    assert spaced == pytest.approx(logits_one_by_one(path, ["say: cat"])[:, 0].tolist(), abs=1e-5)
    assert make_metric("reward_model", model=path)(*BATCH)["reward_model"][1] == pytest.approx(logits.mean().item())


@torch.no_grad()
def test_reward_model_of_chats(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "one"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(str(folder / "one")).eval()
    model.save_pretrained(tmp_path)

    def score(text):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, -64:]
        return model(input_ids=ids).logits[0, 0].item()

    reward = make_reward("reward_model", model=str(tmp_path), separator=" ")
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    got = reward(
        ["say:", chat, "say:", [{"role": "user", "content": "x" * 99}]],
        ["cat", "hi", " cat", "yes"],
        [[]] * 4,
        [{}] * 4,
    )
    expected = ["<u>say:</u><a>cat</a>", "<s>be kind</s><u>hello</u><a>hi</a>", "<u>say:</u><a>cat</a>"]
    expected.append(f"<u>{'x' * 99}</u><a>yes</a>")
    assert got == pytest.approx([score(text) for text in expected], abs=1e-5)
    assert got[0] != pytest.approx(logits_one_by_one(str(tmp_path), [expected[0]])[0, 0].item(), abs=1e-4)  # [CLS]
    # A chat reaches it as messages from the samples, and one without a template as a text.
    samples = [Sample("s", chat, ["hi"], {})]
    for folder_of, text in ((tmp_path, None), (folder / "one", "be kind\nhello hi")):
        rewards = make_rewards(("reward_model",), {"model": str(folder_of)}, {}, samples, byte_tokenizer, "cpu", " ")
        _, means = score_texts(rewards, [1.0], samples, ["hi"], [[1]], 3)
        wanted = got[1] if text is None else logits_one_by_one(str(folder_of), [text])[0, 0].item()
        assert means["reward_model"] == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_reward_model_of_a_language_model(tmp_path, template):
    """A decoder reads the score at its last token, also in a padded batch of one without a token for padding."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, num_labels=1, eos_token_id=0)
    model = tiny_models.spread(GPT2ForSequenceClassification(config)).eval()
    model.save_pretrained(tmp_path)
    prompts, texts = ["say", "say:", "tell me a lot " * 6], [" cat", " a very long answer", " yes"]
    wholes = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    if template:  # the space that a causal policy's response begins with is no part of a message
        wholes = [f"<u>{prompt}</u><a>{text[1:]}</a>" for prompt, text in zip(prompts, texts, strict=True)]
    expected = [
        model(input_ids=tokenizer(text, return_tensors="pt").input_ids[:, -64:]).logits.item() for text in wholes
    ]
    reward = make_reward("reward_model", model=str(tmp_path))
    got = reward(prompts, texts, [[]] * 3, [{}] * 3)
    assert got == pytest.approx(expected, abs=1e-4) and len(set(np.round(got, 3))) == 3
    if not template:  # a policy that says nothing more has texts without a token
        beside = reward([""] * 2, ["", " cat"], [[]] * 2, [{}] * 2)
        assert reward([""] * 2, [""] * 2, [[]] * 2, [{}] * 2) == pytest.approx([beside[0]] * 2, abs=1e-5) != beside


def test_what_is_no_reward_model(folder, tmp_path):
    with pytest.raises(UsageError, match="has the labels inform, question, .*not one output; take classifier"):
        make_reward("reward_model", model=str(folder / "four"))
    with pytest.raises(UsageError, match="clip must be above 0, not -1"):
        make_reward("reward_model", model=str(folder / "one"), clip=-1)
    # a language model has no head that was trained
    AutoModel.from_pretrained(str(folder / "one")).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(str(folder / "one")).save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match="no weights for classifier.bias, classifier.weight"):
        make_reward("reward_model", model=str(tmp_path / "base"))
    with pytest.raises(UsageError, match="bleurt: .* has 4 labels, not one output"):
        make_reward("bleurt", model=str(folder / "four"))
    # templates of which one does not take these messages, and one is none; a tokenizer that cannot pad
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "one"))
    AutoModelForSequenceClassification.from_pretrained(str(folder / "one")).save_pretrained(tmp_path / "chat")
    for template in ("{{ raise_exception('system first') }}", "{% for %}"):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "chat")
        with pytest.raises(UsageError, match="chat template does not take these messages"):
            make_reward("reward_model", model=str(tmp_path / "chat"))(*BATCH)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "chat")
    with pytest.raises(UsageError, match="has no token for padding, and none for the end"):
        make_reward("reward_model", model=str(tmp_path / "chat"))
    # a file that was not fetched whole
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / "one" / name).read_bytes()[: 200 if "safe" in name else None])
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        make_reward("reward_model", model=str(tmp_path))
    assert "\n" not in str(error.value)


def test_learned_metrics_of_half_a_character(folder):
    path = str(folder / "four")
    samples = [Sample("s", "a \ud83d", ["b \ude00"], {"intent": 1})]
    options = {
        "classifier.model": path,
        "intent.model": path,
        "bertscore.model_type": path,
        "bertscore.num_layers": "1",
    }
    options |= {"reward_model.model": str(folder / "one")}
    names = ("classifier", "reward_model", "intent", "bertscore")
    metrics = make_metrics(names, options, {}, samples, byte_tokenizer, "cpu", "")
    row, _ = measure(metrics, samples, ["c \ud83d"], None, None)
    assert sorted(row) == sorted(names)


def test_intent(folder):
    path = str(folder / "four")
    prompts = ["hello.<EOU>how are you? <EOU>", "fine <EOU>", "", "go!<EOU><EOU>"]
    texts = [last + text for last, text in zip(["how are you? ", "fine ", "", "go!"], TEXTS, strict=True)]
    found = logits_one_by_one(path, texts).argmax(dim=1)
    for shift in range(4):
        metas = [{"intent": int((label + shift) % 4) + 1} for label in found]
        correct, accuracy = make_metric("intent", model=path)(prompts, TEXTS, REFERENCES, metas)["intent"]
        assert correct == [float(shift == 0)] * 4
        assert accuracy == float(shift == 0)
        reward = make_reward("intent", model=path, intent_coef=0.75, meteor_coef=0.25)
        meteor = make_reward("meteor")(prompts, TEXTS, REFERENCES, metas)
        expected = [0.75 * hit + 0.25 * score for hit, score in zip(correct, meteor, strict=True)]
        assert reward(prompts, TEXTS, REFERENCES, metas) == pytest.approx(expected, abs=1e-9)
        assert len(set(meteor)) > 1


def test_bleurt_is_the_best_of_the_references(folder):
    path = str(folder / "one")
    expected = []
    for text, references in zip(TEXTS, REFERENCES, strict=True):
        expected.append(logits_one_by_one(path, references, [text] * len(references))[:, 0].max().item())
    assert make_reward("bleurt", model=path)(*BATCH) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_commongen_preference(folder, tmp_path):
    path = str(folder / "t5")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    good, bad = tokenizer("good").input_ids[0], tokenizer("bad").input_ids[0]
    assert (good, bad) == (3, 4)
    expected = []
    for text in TEXTS:
        encoded = tokenizer(text, return_tensors="pt", truncation=True)
        logits = model(**encoded, labels=torch.tensor([[5]])).logits[0, 0].double()
        expected.append((logits[good].exp() / (logits[good].exp() + logits[bad].exp())).item())
    got = make_reward("commongen_preference", model=path, batch_size=3)(*BATCH)
    assert got == pytest.approx(expected, abs=1e-5)
    missing = [1, 2, 2, 1]  # upper-case concepts are never found
    meteor = make_reward("meteor")(*BATCH)
    got = make_reward("commongen_preference", model=path, concept_coef=0.5, meteor_coef=0.3)(*BATCH)
    combined = [p / (1 + 0.5 * n) + 0.3 * m for p, n, m in zip(expected, missing, meteor, strict=True)]
    assert got == pytest.approx(combined, abs=1e-5)
    # the checkpoint file changes the model
    changed = {key: value * 0.5 for key, value in model.state_dict().items()}
    torch.save({"model_state_dict": changed}, tmp_path / "weights.pt")
    other = make_reward("commongen_preference", model=path, weights=str(tmp_path / "weights.pt"))(*BATCH)
    assert other != pytest.approx(expected, abs=1e-3)
    with pytest.raises(UsageError, match="no file 'nowhere.pt'"):
        make_reward("commongen_preference", model=path, weights="nowhere.pt")


# ---- BERTScore ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def bertscore_by_hand(path, text, reference, layer):
    """F1 of greedy matching by cosine. bert-score gives the special tokens at both ends no weight."""
    # RoBERTa's words begin with a space, and bert-score has the first one begin with one too.
    tokenizer, model = (
        AutoTokenizer.from_pretrained(path, add_prefix_space=True),
        AutoModel.from_pretrained(path).eval(),
    )
    states = []
    for words in (text, reference):
        encoded = tokenizer(words.strip(), return_tensors="pt", truncation=True, max_length=64)
        states.append(model(**encoded, output_hidden_states=True).hidden_states[layer][0])
    x, y = (torch.nn.functional.normalize(state, dim=-1) for state in states)
    similarity = x @ y.T
    precision, recall = similarity.max(1).values[1:-1].mean(), similarity.max(0).values[1:-1].mean()
    return (2 * precision * recall / (precision + recall)).item()


@pytest.mark.parametrize("name", ["four", "roberta"])
@pytest.mark.parametrize("layer", [1, 2])
def test_bertscore(folder, name, layer):
    path = str(folder / name)
    got = make_reward("bertscore", model_type=path, num_layers=layer)(*BATCH)
    for score, text, references in zip(got, TEXTS, REFERENCES, strict=True):
        by_hand = [bertscore_by_hand(path, text, reference, layer) for reference in references if reference and text]
        assert score == pytest.approx(max(by_hand, default=0), abs=1e-5)
        assert -1 <= score <= 1
    scores, mean = make_metric("bertscore", model_type=path, num_layers=layer)(*BATCH)["bertscore"]
    assert scores == got and mean == pytest.approx(sum(got) / len(got))


def test_bertscore_of_empty_texts_only(folder):
    reward = make_reward("bertscore", model_type=str(folder / "four"), num_layers=1)
    assert reward([""] * 3, ["", " \n", "a"], [["b"], ["b"], ["", "\t"]], [{}] * 3) == [0, 0, 0]


# ---- SummaC ---------------------------------------------------------------------------------------------------------
DOCUMENTS = [
    "The dog sat on the mat for long. Nobody knew its name at all. It rained. It rained hard.",
    "One short day.",
    "A paragraph of some length here.\n\nAnother paragraph of such length.",
    "",
]
SUMMARIES = [
    "A dog was on a mat. So it is. Nobody knew it then.",
    "",
    "Some length was here and there.",
    "A dog was on a mat.",
]


def images_by_hand(path):
    from nltk import sent_tokenize

    images = []
    for document, summary in zip(DOCUMENTS, SUMMARIES, strict=True):
        premises, claims = ([s for s in sent_tokenize(text) if len(s) > 10] for text in (document, summary))
        image = np.zeros((3, max(len(premises), 1), max(len(claims), 1)))
        if not premises or not claims:
            image = np.zeros((3, 1, 1))
        for i, premise in enumerate(premises):
            for j, claim in enumerate(claims):
                image[:, i, j] = logits_one_by_one(path, [premise], [claim]).softmax(dim=1)[0].numpy()
        images.append(image)
    return images


def test_summac_zs(folder):
    path = str(folder / "nli")
    batch = (DOCUMENTS, SUMMARIES, [[]] * 4, [{}] * 4)
    images = images_by_hand(path)
    both = [float((image[2].max(0) - image[0].max(0)).mean()) for image in images]
    assert make_metric("summac_zs", model=path)(*batch)["summac_zs"][0] == pytest.approx(both, abs=1e-5)
    entailed = [float(image[2].max(0).mean()) for image in images]
    got = make_metric("summac_zs", model=path, use_contradiction=False, batch_size=2)(*batch)["summac_zs"]
    assert got[0] == pytest.approx(entailed, abs=1e-5)
    assert got[1] == pytest.approx(np.mean(entailed), abs=1e-5)
    for granularity in ("paragraph", "document", "2sents", "document-sentence"):
        scores, _ = make_metric("summac_zs", model=path, granularity=granularity)(*batch)["summac_zs"]
        assert all(-1 <= score <= 1 for score in scores)
    with pytest.raises(UsageError, match="granularity 'word'"):
        make_metric("summac_zs", model=path, granularity="word")
    with pytest.raises(UsageError, match="no NLI model"):
        make_metric("summac_zs", model=str(folder / "four"))


@pytest.mark.parametrize("bins, edges", [("even50", 50), ("percentile", 23)])
def test_summac_conv(folder, tmp_path, bins, edges):
    path, weights = str(folder / "nli"), tmp_path / "conv.bin"
    torch.manual_seed(1)
    mlp, final = torch.nn.Linear(edges, 1), torch.nn.Linear(3, 2)
    layers = {"mlp": mlp, "layer_final": final}
    torch.save(
        {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}, weights
    )
    bounds = list(np.arange(0, 1, 1 / 50)) + [1.0]
    if bins == "percentile":
        bounds = [0.0, 0.01, 0.02, 0.03, 0.04, 0.07, 0.13, 0.37, 0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.955, 0.96]
        bounds += [0.965, 0.97, 0.975, 0.98, 0.985, 0.99, 0.995, 1.0]
    expected = []
    for image in images_by_hand(path):
        rows = torch.stack([torch.tensor(np.histogram(column, bounds)[0]).float() for column in image[2].T])
        mean = mlp(rows).mean()
        expected.append(final(torch.stack([mean, mean, mean])).softmax(dim=0)[1].item())
    metric = make_metric("summac_conv", model=path, weights=str(weights), bins=bins)
    got, corpus = metric(DOCUMENTS, SUMMARIES, [[]] * 4, [{}] * 4)["summac_conv"]
    assert got == pytest.approx(expected, abs=1e-5)
    assert corpus == pytest.approx(np.mean(expected), abs=1e-5)
    with pytest.raises(UsageError, match="bins"):
        make_metric("summac_conv", model=path, weights=str(weights), bins="even7")
    with pytest.raises(UsageError, match="summac_conv_vitc_sent_perc_e.bin"):
        make_metric("summac_conv", model=path)


# ---- perplexity -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [16, 48, 64])
def test_golden_perplexity(stride):
    model, tokenizer = tiny_models.formula_gpt2()
    references = [sample["references"] for sample in GOLDEN["samples"]]
    batch = ([""] * len(references), [""] * len(references), references, [{}] * len(references))
    key = f"perplexity_toy_stride{stride}"
    value = make_metric("perplexity", stride=stride)(*batch, model=model, tokenizer=tokenizer)["perplexity"][1]
    assert value == pytest.approx(GOLDEN["corpus"][key], abs=GOLDEN["tolerance"][key])
    # A stride beyond the model's positions would skip tokens: it is taken as those positions.
    long_stride = make_metric("perplexity", stride=512)(*batch, model=model, tokenizer=tokenizer)["perplexity"][1]
    assert long_stride == pytest.approx(GOLDEN["corpus"]["perplexity_toy_stride64"], abs=0.005)


def test_perplexity_of_odd_texts():
    model, tokenizer = tiny_models.formula_gpt2()
    for text in ["", "a", "ab", "x" * 64, "x" * 65, "x" * 129]:  # 65 and 129 leave a window of one token
        for stride in (16, 64):
            metric = make_metric("perplexity", stride=stride)
            assert math.isfinite(metric([""], [""], [[text]], [{}], model=model, tokenizer=tokenizer)["perplexity"][1])
    metas = [{"reference": "the whole"}, {"reference": "text"}]
    by_key = make_metric("perplexity", reference_key="reference")(
        [""] * 2, [""] * 2, [["q"]] * 2, metas, model, tokenizer
    )
    direct = make_metric("perplexity")([""], [""], [["the whole", "text"]], [{}], model, tokenizer)
    assert by_key == direct


# ---- the `evaluate` library -----------------------------------------------------------------------------------------
SCRIPT = """
import datasets
import evaluate


class Lengths(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": REFERENCES})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, scale=1.0):
        lengths = [scale * len(text) for text in predictions]
        return {"lengths": lengths, "total": sum(lengths), "first": len(str(references[0])), "note": "not a number"}
"""


@pytest.mark.parametrize("feature, first", [('datasets.Value("string")', 2), ('[datasets.Value("string")]', 12)])
def test_evaluate_script(tmp_path, feature, first):
    path = tmp_path / f"own{first}.py"
    path.write_text(SCRIPT.replace("REFERENCES", feature))
    metric = make_metric(f"evaluate:{path}", scale=2.0)
    result = metric(["p", "p"], [" one", "three\n"], [["r1", "r2"], ["r3", "r4"]], [{}, {}])  # stripped
    name = path.stem
    assert result == {
        f"{name}/lengths": ([6.0, 10.0], 8.0),
        f"{name}/total": (None, 16.0),
        f"{name}/first": (None, float(first)),
    }


def test_evaluate_unknown(tmp_path):
    with pytest.raises(UsageError, match="evaluate has no metric") as error:
        make_metric(f"evaluate:{tmp_path / 'nowhere.py'}")
    assert "\n" not in str(error.value)


# ---- SPICE, whose Java program and parser are 400 MB: a stand-in that speaks its protocol ---------------------------
FAKE_JAVA = """#!{python}
import json, sys
samples = json.load(open(sys.argv[sys.argv.index("-Xmx8G") + 2]))
rows = []
for sample in samples:
    words = set(sample["test"].split())
    f = max(len(words & set(r.split())) / len(words | set(r.split())) for r in sample["refs"])
    f = float("nan") if sample["test"] == "nan" else f
    row = {{"f": f, "pr": f, "re": f}}
    rows.append({{"image_id": sample["image_id"], "scores": {{"All": row, "Object": row}}}})
json.dump(rows, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


@pytest.fixture
def fake_spice(tmp_path, monkeypatch):
    from pycocoevalcap.spice import spice

    package = tmp_path / "spice"
    (package / "lib").mkdir(parents=True)
    monkeypatch.setattr(spice, "__file__", str(package / "spice.py"))
    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(FAKE_JAVA.format(python=sys.executable))
    java.chmod(java.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{java.parent}{os.pathsep}{os.environ['PATH']}")
    return package


def add_jars(package):
    for jar in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (package / "lib" / jar).touch()


def test_spice_and_spider(fake_spice):
    add_jars(fake_spice)
    texts = ["a b", "", "c d e", "nan", " "] + ["x y"] * 8
    references = [["a c", "a b c"], ["a"], ["", "c d"], ["nan"], ["z"]] + [["x q"]] * 8
    batch = ([""] * 13, texts, references, [{}] * 13)
    expected = [2 / 3, 0, 2 / 3, 0, 0] + [1 / 3] * 8
    assert make_reward("spice")(*batch) == pytest.approx(expected)
    scores, mean = make_metric("spice")(*batch)["spice"]
    assert scores == pytest.approx(expected) and mean == pytest.approx(np.mean(expected))
    spider, cider = make_reward("spider", spice_coef=0.5, cider_coef=2.0), make_reward("cider")
    for reward in (spider, cider):
        reward.prepare(references)
    combined = [0.5 * s + 2.0 * c for s, c in zip(expected, cider(*batch), strict=True)]
    assert spider(*batch) == pytest.approx(combined)
    assert make_reward("spice")([""], [""], [[""]], [{}]) == [0]


def test_spice_says_what_is_missing(fake_spice, monkeypatch):
    with pytest.raises(UsageError, match=r"stanford-corenlp-3.6.0.jar and .*-models.jar.*get_stanford_models"):
        make_reward("spice")
    add_jars(fake_spice)
    (fake_spice / "lib" / "stanford-corenlp-3.6.0.jar").unlink()
    with pytest.raises(UsageError, match="needs stanford-corenlp-3.6.0.jar in"):
        make_metric("spice")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="Java"):
        make_reward("spider")


# ---- what is missing is said at start-up, in one line ---------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, name, kwargs",
    [
        (make_reward, "sentiment", {"model": "nowhere/at-all"}),
        (make_reward, "sentiment", {"model": "./nowhere"}),
        (make_metric, "intent", {"model": "nowhere/at-all"}),
        (make_reward, "bleurt", {"model": "nowhere/at-all"}),
        (make_reward, "bertscore", {"model_type": "nowhere/at-all", "num_layers": 3}),
        (make_reward, "bertscore", {"model_type": "nowhere/at-all"}),
        (make_reward, "commongen_preference", {"model": "nowhere/at-all"}),
        (make_metric, "summac_zs", {"model": "nowhere/at-all"}),
    ],
)
def test_missing_model(kind, name, kwargs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as error:
        kind(name, **kwargs)
    assert "nowhere" in str(error.value) and "\n" not in str(error.value)


def test_impossible_options(folder):
    with pytest.raises(UsageError, match="labels 0 to 3, not 4"):
        make_reward("sentiment", model=str(folder / "four"), label_ix=4)
    with pytest.raises(UsageError, match="num_layers 9"):
        make_reward("bertscore", model_type=str(folder / "four"), num_layers=9)
    with pytest.raises(UsageError, match="lang 'xx-nothing'"):
        make_reward("bertscore", lang="xx-nothing")
    with pytest.raises(UsageError, match="use_entailment"):
        make_metric("summac_zs", use_entailment=False, use_contradiction=False)
