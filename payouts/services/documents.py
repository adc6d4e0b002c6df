"""Invoices and credit notes: numbered without gaps by the database, issued once, and from then on never changed.

What a document says is its `content`; page and PDF are two looks at it. It is issued in the transaction of what it is about, so
that neither exists without the other; the number's row is locked last.
"""

import hashlib
import logging
from datetime import date
from typing import Any

from django.conf import settings
from django.db.models import Q

from marketplace import clock
from marketplace.models import Party
from marketplace.money import Money
from marketplace.services.disclosures import canonical_json
from payouts.documents import compile_pdf
from payouts.models import BillingProfile, Document, Payment, Refund

logger = logging.getLogger(__name__)


def issue_invoice(payment: Payment) -> Document:
    """Inside a transaction that holds the payment: its invoice; the second call finds the first one's."""
    known = Document.objects.filter(payment=payment, kind=Document.Kind.INVOICE, cancels=None).first()
    if known is not None:
        return known
    content = {
        "title": "Invoice",
        "lines": _lines_of(payment),
        "notes": _notes_of(payment),
        **_sums(payment.net, payment.tax, payment),
    }
    return _issue(Document.Kind.INVOICE, payment, content, net=payment.net, tax=payment.tax, due_on=payment.due_on)


def issue_credit_note(refund: Refund) -> Document:
    """Inside the transaction that books a refund as sent: what went back, and of which invoice; once."""
    known = Document.objects.filter(refund=refund, kind=Document.Kind.CREDIT_NOTE, cancels=None).first()
    if known is not None:
        return known
    payment = refund.payment
    assert payment is not None  # a surplus charge has no invoice
    tax = Money(sum(line.tax_micros for line in refund.clawback.lines.all()), refund.currency)
    of = issue_invoice(payment)  # what was paid before there were documents has none yet
    content = {
        "title": "Credit note",
        "lines": [
            {
                "text": _name(line.order_line or line.invoice_line),
                "amount": _text(line.amount_micros - line.tax_micros, refund),
            }
            for line in refund.clawback.lines.select_related(
                "order_line__version__dataset", "invoice_line__version__dataset"
            ).order_by("pk")
        ],
        "notes": [f"Of invoice {of.reference}. Reason: {refund.get_reason_display()}.", _returned_by(refund)],
        **_sums(refund.amount - tax, tax, payment),
    }
    return _issue(Document.Kind.CREDIT_NOTE, payment, content, net=refund.amount - tax, tax=tax, refund=refund)


def cancel_credit_note(refund: Refund) -> Document | None:
    """Inside the transaction that books a refund back: the credit note, if there is one, is invoiced again."""
    note = Document.objects.filter(refund=refund, kind=Document.Kind.CREDIT_NOTE, cancels=None).first()
    return None if note is None else _cancel(note, Document.Kind.INVOICE, "The refund did not reach the buyer.")


def cancel_invoice(payment: Payment, *, why: str) -> Document | None:
    """Inside a transaction: credit an invoice that nobody has to pay any more, if it was issued."""
    invoice = Document.objects.filter(payment=payment, kind=Document.Kind.INVOICE, cancels=None).first()
    return None if invoice is None else _cancel(invoice, Document.Kind.CREDIT_NOTE, why)


def render_pdf(document: Document) -> bytes:
    """The document as PDF; the same bytes whenever it is asked for."""
    set_on = f"{document.issued_on:%Y-%m-%d}"  # for the PDF's own metadata
    return compile_pdf("document", document.content | {"reference": document.reference, "set_on": set_on})


def _cancel(document: Document, kind: Document.Kind, why: str) -> Document:
    known = Document.objects.filter(cancels=document).first()
    if known is not None:
        return known
    content = document.content | {
        "title": "Credit note" if kind == Document.Kind.CREDIT_NOTE else "Invoice",
        "notes": [f"Cancels {document.reference}, issued on {document.issued_on}. {why}"],
    }
    return _issue(kind, document.payment, content, net=document.net, tax=document.tax, cancels=document)


def _issue(
    kind: Document.Kind,
    payment: Payment,
    content: dict[str, Any],
    *,
    net: Money,
    tax: Money,
    due_on: date | None = None,
    refund: Refund | None = None,
    cancels: Document | None = None,
) -> Document:
    buyer = payment.asked_of
    profile = BillingProfile.objects.filter(party=buyer).first()
    today = clock.today()
    content = content | {
        "seller": {"name": settings.SELLER_NAME, "address": settings.SELLER_ADDRESS, "vat_id": settings.SELLER_VAT_ID},
        "buyer": _buyer(buyer, profile),
        "purchase_order": payment.purchase_order,
        "issued_on": str(today),
        "due_on": str(due_on) if due_on else "",
        "bank": settings.SELLER_BANK if due_on else "",
    }
    document = Document.objects.create(
        kind=kind,
        year=today.year,
        number=1,  # the database gives the series' next one
        buyer=buyer,
        payment=payment,
        refund=refund,
        cancels=cancels,
        issued_on=today,
        due_on=due_on,
        net_micros=net.micros,
        tax_micros=tax.micros,
        currency=payment.currency,
        purchase_order=payment.purchase_order,
        vat_id=profile.vat_id if profile else "",
        content=content,
        sha256=hashlib.sha256(canonical_json(content)).hexdigest(),
    )
    document.refresh_from_db(fields=["year", "number"])
    logger.info("Issued document=%s payment=%s total=%s", document.reference, payment.pk, document.total)
    return document


def _buyer(party: Party, profile: BillingProfile | None) -> dict[str, str]:
    if profile is None:
        return {"name": party.name, "address": party.country, "vat_id": ""}
    address = f"{profile.address}\n{profile.country}{f'-{profile.region}' if profile.region else ''}"
    return {"name": profile.legal_name, "address": address, "vat_id": profile.vat_id}


def _lines_of(payment: Payment) -> list[dict[str, str]]:
    if payment.order is not None:
        lines = payment.order.lines.select_related("order", "version__dataset").order_by("pk")
        return [{"text": _name(line), "amount": _text(line.price_micros, payment)} for line in lines]
    assert payment.invoice is not None  # a database check
    found = []
    for invoice in payment.invoice.asked_with_it:
        report = invoice.report
        period = f"{report.model.name}, {report.period_start} to {report.period_end}"
        for line in invoice.lines.filter(~Q(amount_micros=0)).select_related("version__dataset").order_by("pk"):
            share = f"{line.share_ppq / 1e13:.2f} % of {report.revenue} at {line.rate_bps / 100:g} %"
            text = f"{_name(line)}. {period}: {share}{', capped' if line.is_capped else ''}"
            found.append({"text": text, "amount": _text(line.amount_micros, payment)})
    return found


def _returned_by(refund: Refund) -> str:
    transfer = refund.transfer
    if transfer is None:
        return "It went back to the card that paid."
    return f"It went back by bank transfer on {transfer.sent_on}, reference {transfer.reference}."


def _name(line: Any) -> str:
    return f"{line.version.dataset.title}, version {line.version.number}"


def _notes_of(payment: Payment) -> list[str]:
    notes = []
    if payment.tax_rate is not None and not payment.tax_micros:
        notes.append(f"Reverse charge: {payment.tax_rate.name} is owed by the recipient.")
    if payment.status == Payment.Status.PAID:
        notes.append("Paid. Nothing is due.")
    elif payment.due_on:
        notes.append("Please name the invoice's number with your transfer, or pay on its page.")
    if payment.order is not None:
        notes.append(f"Order {payment.order.public_id}")
    return notes


def _sums(net: Money, tax: Money, payment: Payment) -> dict[str, str]:
    return {
        "net": _text(net.micros, payment),
        "tax_name": str(payment.tax_rate) if tax else "",
        "tax": _text(tax.micros, payment) if tax else "",
        "total": _text(net.micros + tax.micros, payment),
        "currency": payment.currency,
    }


def _text(micros: int, of: Any) -> str:
    return Money(micros, of.currency).amount_text(exact=True)
