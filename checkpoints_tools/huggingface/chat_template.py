"""The chat template of models whose vocabulary has the reserved tokens: the same tokens as in prepared conversations.

mmscale/data/documents/schema.py and mmscale/data/prepared/encode.py make those; a test compares both token by token.
"""

from __future__ import annotations

from mmscale.data.documents.chat import TOKENS_OF_ROLES
from mmscale.data.vocab import ASSISTANT, END_OF_TURN

_TEMPLATE = """\
{{- bos_token }}
{%- set roles = ROLES %}
{%- for message in messages %}
    {%- if message.role not in roles %}
        {{- raise_exception("unknown role " ~ message.role) }}
    {%- endif %}
    {{- roles[message.role] }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == "text" %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception("use the processor for messages with pictures") }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- "END_OF_TURN" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "ASSISTANT" }}
{%- endif %}
"""


def chat_template() -> str:
    """The template in Jinja. `add_generation_prompt` ends it where the assistant begins."""
    roles = "{" + ", ".join(f'"{role}": "{token}"' for role, token in TOKENS_OF_ROLES.items()) + "}"
    return _TEMPLATE.replace("ROLES", roles).replace("END_OF_TURN", END_OF_TURN).replace("ASSISTANT", ASSISTANT)
