"""Stripe's HTTP API, small and stateful, for a machine without a Stripe key; checked against Stripe's own document.

It plays a remote company: a process of its own, its own file, no Django, no transaction shared with the marketplace.

    schema.py    Stripe's OpenAPI document, and whether a request, an answer or an event agrees with it
    store.py     the company's file: objects, idempotency keys, deliveries, an agenda of what falls due
    world.py     one request's view of that file: objects made, changed, expanded, and the events this causes
    objects.py   how each object looks when new
    funds.py     fees, pending and available money, automatic payouts
    endpoints.py what each endpoint does
    pages.py     the hosted pages: paying, onboarding
    app.py       HTTP: keys, versions, idempotency, errors in Stripe's shape
    delivery.py  webhooks: signed, retried, remembered over a restart
    process.py   starting it, stopping it and killing it from another process
"""
