"""A server for one model: predictions, explanations, and a page to look at them; bounded, limited, safe by default.

    settings.py   ServerConfig: addresses, limits, timeouts
    serve.py      serve: from a run or an export to a process that answers until it is told to stop
    protocol.py   slow and endless headers, slow readers, too many connections: below HTTP
    guard.py      what every request passes: host, token, size, body, logs, security headers
    slots.py      how many requests may wait
    uploads.py    from a body to images, within limits
    served.py     the model that answers, with its threads
    batching.py   images of several requests computed together, on a GPU
    explaining.py explanations, by the run's Keras model, loaded when first asked
    app.py        the routes of version 1, the page, and the description of them all
    inference.py  the Open Inference Protocol, version 2
    metrics.py    what Prometheus reads
    logs.py       a line of JSON for each event

Importing it loads neither the web framework nor Keras.
"""

from vitreous.server.serve import serve
from vitreous.server.settings import ServerConfig

__all__ = ["ServerConfig", "serve"]
