"""Small random models with small tokenizers, saved as the real ones are, for tests of learned rewards and metrics."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def spread(model):
    """Random weights large enough that outputs differ from text to text."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(0, 0.4)
    return model


def save_bert(folder, labels, positions=64):
    """A BERT classifier reading letters; `labels` gives their names."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        max_position_embeddings=positions,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **SIZES,
    )
    spread(BertForSequenceClassification(config)).save_pretrained(folder)
    return str(folder)


def save_roberta(folder, positions=66):
    """A RoBERTa classifier with two labels, reading bytes, whose tokenizer claims no limit of length."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet]
    RobertaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(words),
        max_position_embeddings=positions,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        **SIZES,
    )
    spread(RobertaForSequenceClassification(config)).save_pretrained(folder)
    return str(folder)


def save_t5(folder):
    """A T5 reading letters, to which "good" and "bad" are words."""
    words = ["<pad>", "</s>", "<unk>", "good", "bad", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("good|bad|."), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    spread(T5ForConditionalGeneration(config)).save_pretrained(folder)
    return str(folder)


def save_policy(folder, seq2seq, positions=64, eos_scale=1.0):
    """A T5 or GPT-2 reading bytes to start runs from, with random weights that give EOS a fair share."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if seq2seq:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    ids = dict(vocab_size=len(words), pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    if seq2seq:
        sizes = dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes, **ids))
    else:
        sizes = dict(n_embd=32, n_layer=1, n_head=2, n_positions=positions)
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=1, **sizes, **ids))
    with torch.no_grad():  # a longer vector is likelier in half of the states
        model.get_output_embeddings().weight[1] *= eos_scale
    model.save_pretrained(folder)
    return str(folder)


def formula_gpt2():
    """The golden file's toy GPT-2 with weights by formula, and its tokenizer, whose ids are the text's bytes."""
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            weights = 0.1 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + 1.3 * i + 1.0)
            if ".ln_" in name and name.endswith("weight"):
                weights = 1 + weights
            parameter.copy_(weights.reshape(parameter.shape).float())
    return model, byte_tokenizer


class Ids:
    def __init__(self, ids):
        self.input_ids = ids


def byte_tokenizer(text):
    return Ids(list(text.encode("utf-8")))
