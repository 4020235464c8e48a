"""A checkpoint served over an HTTP API: OpenAI's chat completions, and a web page that uses them.

Paper: none; what is asked over HTTP passes the same door as everything else, ``inference.chat.Chat``.
"""
