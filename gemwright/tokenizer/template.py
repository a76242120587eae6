"""The chat template for other programs: a conversation as one text, control tokens spelled out.

Ours, in Jinja, with what transformers, llama.cpp and their kin know in common. It gives the ids of
`gemwright.tokenizer.chat` for all content that spells no control token and does not begin with a newline; the
module there says why it is the better road. `<eos>` ends a conversation whose last word is the model's, which
the template that Google published never writes, so that a model tuned with it never learns to.

Transformers' `{% generation %}` marks, from which it makes a loss mask, are left out: Jinja itself and Rust's
minijinja refuse a template with an unknown tag, so the model would not load there. The mask comes from
`encode_conversation`.
"""

TEMPLATE_FILE = "chat_template.jinja"

END_OF_LAST_ANSWER = r"""
    {%- elif role == 'model' -%}
        {{- eos_token -}}"""
"""The part of `TEMPLATE` that ends a conversation. Programs that render a chat turn by turn do without it."""

TEMPLATE = r"""{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- if role == 'system' -%}
        {{- raise_exception('Gemma 2 has no system role: begin the first user message with its text.') -}}
    {%- elif role != ('user' if loop.index0 % 2 == 0 else 'model') -%}
        {{- raise_exception('The roles are user, model, user, model, and so on, the user first.') -}}
    {%- elif message['content'] is not string -%}
        {{- raise_exception('The content of a message must be a string.') -}}
    {%- elif loop.last and role == 'model' and add_generation_prompt -%}
        {{- raise_exception('The last message is the model\'s: there is nothing to answer.') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + role + '\n' + message['content'] + '<end_of_turn>' -}}
    {%- if not loop.last or add_generation_prompt -%}
        {{- '\n' -}}
    {%- elif role == 'model' -%}
        {{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' -}}
{%- endif -%}
"""
"""What `Tokenizer.save` writes to `chat_template.jinja`."""
