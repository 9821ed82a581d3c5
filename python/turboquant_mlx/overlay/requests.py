"""Checks of a server's requests that need the model; bodies.py has the others.  mlx-lm's one generating thread serves every
client, and what it meets in a request outside of its own checks ends that thread or the process: an empty prompt, top_k
beyond the vocabulary, a logit_bias of a token that does not exist (an index that MLX does not check).  Here each is an
error of that request alone."""

import mlx.core as mx

from . import turns


def checked(module):
    """`module.ResponseGenerator` of mlx_lm.server, which refuses such requests with ValueError: the client gets the
    message, the others their answers."""

    class Checked(module.ResponseGenerator):
        def _tokenize(self, tokenizer, request, args):
            """Runs in the generating thread, with the request's model loaded, where mlx-lm catches what it raises."""
            prompt, segments, kinds, state, vision = super()._tokenize(tokenizer, request, args)
            if not prompt:
                raise ValueError("the prompt must have at least one token; got none")
            if request.request_type == "chat" and tokenizer.has_chat_template and vision is None:
                template = self.model_provider.cli_args.chat_template_args | (args.chat_template_kwargs or {})
                template["tools"] = request.tools
                segments, kinds = turns.cut(tokenizer, request.messages, prompt, segments, kinds, **template)
            turns.note(segments)
            if args.sampling.top_k > 0 or args.logits.logit_bias:
                _check_vocabulary(args, _vocabulary(self.model_provider.model))
            return prompt, segments, kinds, state, vision

    return Checked


def _check_vocabulary(args, size):
    if args.sampling.top_k >= size:
        raise ValueError(f"top_k must be less than the vocabulary's {size} tokens; got {args.sampling.top_k}")
    strange = [token for token in args.logits.logit_bias or {} if not 0 <= token < size]
    if strange:
        raise ValueError(f"logit_bias must be of tokens from 0 to {size - 1}; got {strange[0]}")


def _vocabulary(model):
    """The number of logits, from the shape of a graph that nobody computes."""
    return model(mx.zeros((1, 1), mx.int32)).shape[-1]
