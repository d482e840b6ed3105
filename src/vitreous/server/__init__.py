"""A server for one model: predictions, explanations, and a page to look at them; bounded, limited, safe by default.

    settings.py   ServerConfig: addresses, limits, timeouts
    serve.py      serve: from a run or an export to answers, until it is told to stop
    process.py    Process: uvicorn with signals of our own
    tls.py        certificate and key
    protocol.py   slow and endless headers, slow readers, too many connections: below HTTP
    guard.py      what every request passes: host, token, size, body, logs, security headers
    slots.py      how many requests may wait
    uploads.py    from a body to images, within limits
    service.py    the model that answers now, threads, deadlines, reload
    served.py     the model, and what is known of it
    batching.py   images of several requests computed together, on a GPU
    explaining.py explanations, by the run's Keras model, loaded when first asked
    examples.py   images to try the model on
    app.py        the routes of version 1, the page, and the description of them all
    inference.py  the Open Inference Protocol, version 2
    metrics.py    what Prometheus reads
    cluster.py    the same on many machines, by Ray Serve
    logs.py       a line of JSON for each event

Importing it loads neither the web framework nor Keras.
"""

from vitreous.server.serve import serve
from vitreous.server.settings import ServerConfig

__all__ = ["ServerConfig", "serve"]
