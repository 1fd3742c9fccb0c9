"""Metrics of evidence.py that are in no table of rewards.py: a judge that no policy is trained on, and the KL of the
policy as it is evaluated, without NLPO's mask."""

import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import datapools


class judge:
    """The probability that a text is of a positive review: naive Bayes over words and pairs of words.

    Counts are binary and smoothed by one, as in Wang and Manning 2012, https://aclanthology.org/P12-2018.
    """

    def __init__(self, counts: str):
        table = json.loads(Path(counts).read_text())
        totals = [sum(column) + len(table) for column in zip(*table.values(), strict=True)]
        prior = math.log(totals[0] / totals[1])
        self.weights = {gram: math.log((n[1] + 1) / (n[0] + 1)) + prior for gram, n in table.items()}

    def __call__(self, prompts, generations, references, metas):
        values = []
        for generation in generations:
            words = generation.lower().split()
            grams = {*words, *map(" ".join, zip(words, words[1:], strict=False))}
            values.append(1 / (1 + math.exp(-sum(self.weights.get(gram, 0.0) for gram in grams))))
        return values


class start_kl:
    """`kl`: KL(policy || start model) in nats per token, over the whole vocabulary, at the tokens of the policy's own
    texts. `reference_perplexity`: the policy's of the first reference of each prompt.

    Texts are encoded again, so that where a word can be written in two ways it is the tokenizer's. `without_eos` takes
    the distributions over all other tokens, as where a minimum length bans EOS.
    """

    def __init__(self, device, start: str, prompt_length: int, truncation_side: str, without_eos: bool = False):
        self.seq2seq = datapools.model_config(start).is_encoder_decoder
        self.start = (AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM).from_pretrained(start)
        self.start.to(device).eval()
        self.prompts = (prompt_length, truncation_side, self.seq2seq)
        self.without_eos = without_eos

    def logprobs(self, prompts, texts, models, tokenizer):
        """(B, T, V) of each model, (B, T) ids and (B, T) where there is a token."""
        eos, pad, device = tokenizer.eos_token_id, tokenizer.pad_token_id, self.start.device
        prompt_ids = datapools.encode_prompts(tokenizer, prompts, *self.prompts)
        ends = [] if self.without_eos else [eos]
        text_ids = [tokenizer(text, add_special_tokens=False).input_ids + ends or [eos] for text in texts]
        queries, query_mask = datapools.pad(prompt_ids, pad, device, left=not self.seq2seq)  # (B, Q)
        ids, mask = datapools.pad(text_ids, pad, device)  # (B, T)
        if not self.seq2seq:  # no more than the model has positions for
            ids, mask = (x[:, : self.start.config.n_positions - queries.shape[1]] for x in (ids, mask))
        found = []
        for model in models:
            if self.seq2seq:
                begin = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
                before = torch.cat([begin, ids[:, :-1]], dim=1)
                logits = model(input_ids=queries, attention_mask=query_mask, decoder_input_ids=before).logits
            else:
                attention = torch.cat([query_mask, mask], dim=1).long()
                where = dict(attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0))
                logits = model(input_ids=torch.cat([queries, ids], dim=1), **where).logits[:, queries.shape[1] - 1 : -1]
            if self.without_eos:
                logits[..., eos] = -1e9
            found.append(logits.float().log_softmax(-1))
        return found, ids, mask

    @torch.no_grad()
    def __call__(self, prompts, generations, references, metas, model, tokenizer):
        kl, tokens, nll, reference_tokens = [], [], 0.0, 0
        for i in range(0, len(prompts), 50):
            few = slice(i, i + 50)
            (new, old), _, mask = self.logprobs(prompts[few], generations[few], (model, self.start), tokenizer)
            kl += ((new.exp() * (new - old)).sum(-1) * mask).sum(1).tolist()
            tokens += mask.sum(1).tolist()
            texts = [some[0] for some in references[few]]
            (new,), ids, mask = self.logprobs(prompts[few], texts, (model,), tokenizer)
            nll -= (new.gather(-1, ids[..., None]).squeeze(-1) * mask).sum().item()
            reference_tokens += mask.sum().item()
        return {
            "kl": ([each / n for each, n in zip(kl, tokens, strict=True)], sum(kl) / sum(tokens)),
            "reference_perplexity": (None, math.exp(nll / reference_tokens)),
        }
