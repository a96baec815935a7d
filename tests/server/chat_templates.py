"""Chat templates of the four kinds that matter, short and of the published ones' structure."""

CHATML = """\
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

HERMES = """\
{%- if tools %}
<|im_start|>system
You may call functions: {% for tool in tools %}{{ tool | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}

Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
<|im_start|>{{ message.role }}
{% if message.tool_calls %}
{% for call in message.tool_calls %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{% endfor %}
{% else %}
{{ message.content }}
{% endif %}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if tools is not none %}
Environment: ipython
Respond with JSON: {"name": function name, "parameters": dictionary}
{{ tools | tojson(indent=2) }}
{% endif %}
{%- for message in messages %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

MISTRAL = """\
{%- set loop_messages = messages %}
{%- if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}{% endif %}
{{- bos_token }}
{%- for message in loop_messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{%- if message.role == 'user' %}
{%- if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
[INST] {{ message.content }}[/INST]
{%- elif message.tool_calls %}
[TOOL_CALLS]{{ message.tool_calls | tojson }}{{ eos_token }}
{%- else %}
 {{ message.content }}{{ eos_token }}
{%- endif %}
{%- endfor %}"""
