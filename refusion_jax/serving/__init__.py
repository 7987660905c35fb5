"""The server's parts; README.md says what it does.

app.py        routes               around.py     what surrounds every request
protocol.py   bodies in            responses.py  bodies out
exchange.py   a request's jobs     device.py     the thread that owns the engines
scoring.py    log-probabilities    metrics.py    figures and the log
page/         the page
"""
