"""Serve a checkpoint over HTTP: OpenAI's chat completions, and a web page that uses them.

Paper: none. Requests are answered by ``inference.chat.Chat``, like all other questions.
"""
