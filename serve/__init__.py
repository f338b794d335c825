"""The chat service: an OpenAI-compatible API and a page (http), the models behind them (host),
and the Ray Serve deployment around both (app). Only app and ray_meter know Ray.
"""
