"""How each object looks when it is new: every field that Stripe always sends, with its usual value.

Fields whose names begin with an underscore are kept, never shown.
"""

import secrets
from typing import Any

from payouts.local_stripe import schema
from payouts.local_stripe.store import Body
from payouts.local_stripe.world import new_id

DAY = 24 * 3600
LINK_LIVES = 5 * 60  # seconds; an onboarding link is for the person who just asked for it
SESSION_LIVES = DAY
NO_ADDRESS = {"city": None, "country": None, "line1": None, "line2": None, "postal_code": None, "state": None}
#: Country → the currency of its accounts; others settle in US dollars.
CURRENCIES = {"US": "usd", "GB": "gbp", "JP": "jpy"} | dict.fromkeys(
    ["AT", "BE", "DE", "EE", "ES", "FI", "FR", "GR", "IE", "IT", "LT", "LU", "LV", "MT", "NL", "PT", "SI", "SK"], "eur"
)


def empty_list(url: str) -> Body:
    return {"object": "list", "data": [], "has_more": False, "url": url}


def customer(params: dict[str, Any], *, now: int) -> Body:
    return {
        "id": new_id("cus", 14),
        "object": "customer",
        "address": None,
        "balance": 0,
        "created": now,
        "currency": None,
        "default_source": None,
        "delinquent": False,
        "description": params.get("description"),
        "discount": None,
        "email": params.get("email"),
        "invoice_prefix": secrets.token_hex(4).upper(),
        "invoice_settings": {
            "custom_fields": None,
            "default_payment_method": None,
            "footer": None,
            "rendering_options": None,
        },
        "livemode": False,
        "metadata": params.get("metadata") or {},
        "name": params.get("name"),
        "phone": params.get("phone"),
        "preferred_locales": [],
        "shipping": None,
        "tax_exempt": "none",
        "test_clock": None,
    }


def line_item(item: dict[str, Any], *, now: int) -> Body:
    """A line item over an inline price, as `line_items[][price_data]` makes one."""
    price = item["price_data"]
    quantity = item.get("quantity", 1)
    total = price["unit_amount"] * quantity
    return {
        "id": new_id("li"),
        "object": "item",
        "amount_discount": 0,
        "amount_subtotal": total,
        "amount_tax": 0,
        "amount_total": total,
        "currency": price["currency"],
        "description": price["product_data"]["name"],
        "metadata": item.get("metadata", {}),
        "price": {
            "id": new_id("price"),
            "object": "price",
            "active": False,  # an inline price serves one session
            "billing_scheme": "per_unit",
            "created": now,
            "currency": price["currency"],
            "custom_unit_amount": None,
            "livemode": False,
            "lookup_key": None,
            "metadata": {},
            "nickname": None,
            "product": new_id("prod", 14),
            "recurring": None,
            "tax_behavior": "unspecified",
            "tiers_mode": None,
            "transform_quantity": None,
            "type": "one_time",
            "unit_amount": price["unit_amount"],
            "unit_amount_decimal": str(price["unit_amount"]),
        },
        "quantity": quantity,
    }


def checkout_session(params: dict[str, Any], *, now: int, base_url: str, currency: str, items: list[Body]) -> Body:
    identifier = new_id("cs_test", 58)
    total = sum(item["amount_total"] for item in items)
    return {
        "id": identifier,
        "object": "checkout.session",
        "adaptive_pricing": {"enabled": False},
        "after_expiration": None,
        "allow_promotion_codes": None,
        "amount_subtotal": total,
        "amount_total": total,
        "automatic_tax": {"enabled": False, "liability": None, "provider": None, "status": None},
        "billing_address_collection": None,
        "cancel_url": params.get("cancel_url"),
        "client_reference_id": params.get("client_reference_id"),
        "collected_information": None,
        "consent": None,
        "consent_collection": None,
        "created": now,
        "currency": currency,
        "currency_conversion": None,
        "custom_fields": [],
        "custom_text": {
            "after_submit": None,
            "shipping_address": None,
            "submit": None,
            "terms_of_service_acceptance": None,
        },
        "customer": params.get("customer"),
        "customer_creation": params.get("customer_creation", "if_required"),
        "customer_details": None,
        "customer_email": params.get("customer_email"),
        "discounts": [],
        "expires_at": params.get("expires_at", now + SESSION_LIVES),
        "invoice": None,
        "invoice_creation": None,
        "livemode": False,
        "locale": params.get("locale"),
        "metadata": params.get("metadata") or {},
        "mode": "payment",
        "payment_intent": None,  # made when the customer pays
        "payment_link": None,
        "payment_method_collection": "if_required",
        "payment_method_configuration_details": None,
        "payment_method_options": {},
        # Without a choice of the merchant's, what its dashboard switches on and the currency allows.
        "payment_method_types": params.get("payment_method_types") or payment_methods(currency),
        "payment_status": "unpaid",
        "phone_number_collection": {"enabled": False},
        "recovered_from": None,
        "setup_intent": None,
        "shipping_address_collection": None,
        "shipping_cost": None,
        "shipping_options": [],
        "status": "open",
        "submit_type": params.get("submit_type"),
        "subscription": None,
        "success_url": params["success_url"],
        "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
        "ui_mode": "hosted_page",
        "url": f"{base_url}/c/pay/{identifier}",
        "_line_items": items,
        "_payment_intent_data": params.get("payment_intent_data", {}),
    }


def payment_methods(currency: str) -> list[str]:
    return ["card", "us_bank_account"] if currency == "usd" else ["card"]


def payment_intent(session: Body, *, now: int) -> Body:
    identifier = new_id("pi")
    wanted = session["_payment_intent_data"]
    return {
        "id": identifier,
        "object": "payment_intent",
        "amount": session["amount_total"],
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": 0,
        "application": None,
        "application_fee_amount": None,
        "automatic_payment_methods": None,
        "canceled_at": None,
        "cancellation_reason": None,
        "capture_method": "automatic_async",
        "client_secret": f"{identifier}_secret_{secrets.token_hex(12)}",
        "confirmation_method": "automatic",
        "created": now,
        "currency": session["currency"],
        "customer": session["customer"],
        "description": wanted.get("description"),
        "last_payment_error": None,
        "latest_charge": None,
        "livemode": False,
        "metadata": wanted.get("metadata", {}),
        "next_action": None,
        "on_behalf_of": None,
        "payment_method": None,
        "payment_method_configuration_details": None,
        "payment_method_options": {},
        "payment_method_types": session["payment_method_types"],
        "processing": None,
        "receipt_email": wanted.get("receipt_email"),
        "review": None,
        "setup_future_usage": None,
        "shipping": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": wanted.get("statement_descriptor_suffix"),
        "status": "requires_payment_method",
        "transfer_data": None,
        "transfer_group": wanted.get("transfer_group"),
        "_session": session["id"],
    }


def charge(
    intent: Body,
    *,
    now: int,
    email: str | None,
    name: str | None,
    card: dict[str, Any] | None = None,
    us_bank_account: dict[str, Any] | None = None,
) -> Body:
    """A charge on a card or a bank account, as yet neither succeeded nor failed."""
    details: Body
    if card is not None:
        details = {"type": "card", "card": card}
    else:
        details = {"type": "us_bank_account", "us_bank_account": us_bank_account}
    return {
        "id": new_id("ch" if card is not None else "py"),
        "object": "charge",
        "amount": intent["amount"],
        "amount_captured": 0,
        "amount_refunded": 0,
        "application": None,
        "application_fee": None,
        "application_fee_amount": None,
        "balance_transaction": None,
        "billing_details": {"address": dict(NO_ADDRESS), "email": email, "name": name, "phone": None, "tax_id": None},
        "calculated_statement_descriptor": "RESIDUAL",
        "captured": False,
        "created": now,
        "currency": intent["currency"],
        "customer": intent["customer"],
        "description": intent["description"],
        "disputed": False,
        "failure_balance_transaction": None,
        "failure_code": None,
        "failure_message": None,
        "fraud_details": {},
        "livemode": False,
        "metadata": dict(intent["metadata"]),
        "on_behalf_of": None,
        "outcome": None,
        "paid": False,
        "payment_intent": intent["id"],
        "payment_method": new_id("pm"),
        "payment_method_details": details,
        "radar_options": {},
        "receipt_email": intent["receipt_email"],
        "receipt_number": None,
        "receipt_url": None,
        "refunded": False,
        "review": None,
        "shipping": None,
        "source_transfer": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": intent["statement_descriptor_suffix"],
        "status": "pending",
        "transfer_data": None,
        "transfer_group": intent["transfer_group"],
    }


def outcome(*, kind: str, message: str, reason: str | None = None, status: str = "approved_by_network") -> Body:
    return {
        "advice_code": None,
        "network_advice_code": None,
        "network_decline_code": None,
        "network_status": status,
        "reason": reason,
        "risk_level": "normal",
        "risk_score": 20,
        "seller_message": message,
        "type": kind,
    }


def us_bank_account_details(*, number: str, routing: str) -> Body:
    return {
        "account_holder_type": "company",
        "account_type": "checking",
        "bank_name": "STRIPE TEST BANK",
        "fingerprint": secrets.token_hex(8),
        "last4": number[-4:],
        "payment_reference": None,
        "routing_number": routing,
    }


def card_details(*, brand: str, last4: str, exp_month: int, exp_year: int) -> Body:
    return {
        "amount_authorized": None,
        "authorization_code": None,
        "brand": brand,
        "checks": {"address_line1_check": None, "address_postal_code_check": None, "cvc_check": "pass"},
        "country": "US",
        "exp_month": exp_month,
        "exp_year": exp_year,
        "fingerprint": secrets.token_hex(8),
        "funding": "credit",
        "installments": None,
        "last4": last4,
        "mandate": None,
        "network": brand,
        "network_token": {"used": False},
        "network_transaction_id": str(secrets.randbelow(10**15)),
        "regulated_status": "unregulated",
        "three_d_secure": None,
        "wallet": None,
    }


def destination_payment(transfer: Body, *, now: int) -> Body:
    """What a transfer looks like from the account that receives it: a charge without a card."""
    return {
        "id": new_id("py"),
        "object": "charge",
        "amount": transfer["amount"],
        "amount_captured": transfer["amount"],
        "amount_refunded": 0,
        "application": None,
        "application_fee": None,
        "application_fee_amount": None,
        "balance_transaction": None,
        "billing_details": {"address": dict(NO_ADDRESS), "email": None, "name": None, "phone": None, "tax_id": None},
        "calculated_statement_descriptor": None,
        "captured": True,
        "created": now,
        "currency": transfer["currency"],
        "customer": None,
        "description": None,
        "disputed": False,
        "failure_balance_transaction": None,
        "failure_code": None,
        "failure_message": None,
        "fraud_details": {},
        "livemode": False,
        "metadata": {},
        "on_behalf_of": None,
        "outcome": None,
        "paid": True,
        "payment_intent": None,
        "payment_method": None,
        "payment_method_details": {"type": "stripe_account", "stripe_account": {}},
        "receipt_email": None,
        "receipt_number": None,
        "receipt_url": None,
        "refunded": False,
        "review": None,
        "shipping": None,
        "source_transfer": transfer["id"],
        "statement_descriptor": None,
        "statement_descriptor_suffix": None,
        "status": "succeeded",
        "transfer_data": None,
        "transfer_group": transfer["transfer_group"],
    }


def refund(charge: Body, *, amount: int, now: int, reason: str | None = None, metadata: Body | None = None) -> Body:
    """Money on its way back to the card or the account it came from."""
    body = {
        "id": new_id("re"),
        "object": "refund",
        "amount": amount,
        "balance_transaction": None,
        "charge": charge["id"],
        "created": now,
        "currency": charge["currency"],
        "destination_details": {
            "type": "card",
            "card": {"reference_status": "pending", "reference_type": "acquirer_reference_number", "type": "refund"},
        },
        "metadata": metadata or {},
        "payment_intent": charge["payment_intent"],
        "reason": reason,
        "receipt_number": None,
        "source_transfer_reversal": None,
        "status": "succeeded",
        "transfer_reversal": None,
    }
    if charge["payment_method_details"]["type"] == "us_bank_account":
        body["destination_details"] = {"type": "us_bank_transfer", "us_bank_transfer": {"reference_status": "pending"}}
    return body


def transfer_reversal(transfer: Body, *, amount: int, now: int, metadata: Body | None = None) -> Body:
    return {
        "id": new_id("trr"),
        "object": "transfer_reversal",
        "amount": amount,
        "balance_transaction": None,
        "created": now,
        "currency": transfer["currency"],
        "destination_payment_refund": None,  # made beside it
        "metadata": metadata or {},
        "source_refund": None,
        "transfer": transfer["id"],
    }


#: The texts of a dispute's evidence; files are not played.
EVIDENCE_TEXTS = (
    "access_activity_log",
    "billing_address",
    "cancellation_policy_disclosure",
    "cancellation_rebuttal",
    "customer_email_address",
    "customer_name",
    "customer_purchase_ip",
    "duplicate_charge_explanation",
    "duplicate_charge_id",
    "product_description",
    "refund_policy_disclosure",
    "refund_refusal_explanation",
    "service_date",
    "shipping_address",
    "shipping_carrier",
    "shipping_date",
    "shipping_tracking_number",
    "uncategorized_text",
)
_EVIDENCE_FILES = (
    "cancellation_policy",
    "customer_communication",
    "customer_signature",
    "duplicate_charge_documentation",
    "receipt",
    "refund_policy",
    "service_documentation",
    "shipping_documentation",
    "uncategorized_file",
)
EVIDENCE_DAYS = 9  # from the dispute to the last day on which evidence is taken
#: Reason → the network's own code for it, as Visa writes them.
NETWORK_CODES = {"fraudulent": "10.4", "product_not_received": "13.1", "duplicate": "12.6", "general": "13.3"}


def dispute(charge: Body, *, amount: int, reason: str, is_inquiry: bool, now: int) -> Body:
    """A cardholder's complaint at their bank; an inquiry asks before any money is taken."""
    card = charge["payment_method_details"]["card"]
    email = charge["billing_details"]["email"]
    name = charge["billing_details"]["name"]
    return {
        "id": new_id("du"),
        "object": "dispute",
        "amount": amount,
        "balance_transactions": [],
        "charge": charge["id"],
        "created": now,
        "currency": charge["currency"],
        "enhanced_eligibility_types": [],
        "evidence": dict.fromkeys((*EVIDENCE_TEXTS, *_EVIDENCE_FILES))
        | {"customer_email_address": email, "customer_name": name, "enhanced_evidence": {}},
        "evidence_details": {
            "due_by": (now // DAY + EVIDENCE_DAYS + 1) * DAY - 1,
            "enhanced_eligibility": {},
            "has_evidence": False,
            "past_due": False,
            "submission_count": 0,
        },
        "is_charge_refundable": is_inquiry,
        "livemode": False,
        "metadata": {},
        "payment_intent": charge["payment_intent"],
        "payment_method_details": {
            "type": "card",
            "card": {
                "brand": card["brand"],
                "case_type": "inquiry" if is_inquiry else "chargeback",
                "network": card["network"],
                "network_reason_code": NETWORK_CODES.get(reason, NETWORK_CODES["general"]),
            },
        },
        "reason": reason,
        "status": "warning_needs_response" if is_inquiry else "needs_response",
    }


#: Where the finance reports file a movement, for the kinds whose name is not already that.
REPORTED_AS = {"payment": "charge", "payment_refund": "refund", "transfer_refund": "transfer_reversal"}


def balance_transaction(
    *,
    kind: str,
    source: str,
    amount: int,
    currency: str,
    now: int,
    available_on: int,
    fee: int = 0,
    fee_name: str = "Stripe processing fees",
    category: str | None = None,
    description: str | None = None,
) -> Body:
    """One movement of a balance; `amount` and `net` are signed, minor units."""
    details = []
    if fee:
        details = [
            {
                "amount": fee,
                "application": None,
                "currency": currency,
                "description": fee_name,
                "type": "stripe_fee",
            }
        ]
    return {
        "id": new_id("txn"),
        "object": "balance_transaction",
        "amount": amount,
        "available_on": available_on,
        "balance_type": "payments",
        "created": now,
        "currency": currency,
        "description": description,
        "exchange_rate": None,
        "fee": fee,
        "fee_details": details,
        "net": amount - fee,
        "reporting_category": category or REPORTED_AS.get(kind, kind),
        "source": source,
        "status": "pending" if available_on > now else "available",
        "type": kind,
    }


def account(params: dict[str, Any], *, now: int) -> Body:
    """A connected account before onboarding: it can do nothing yet."""
    identifier = new_id("acct", 16)
    country = params.get("country", "US")
    asked = params.get("controller", {})
    controller = {
        "fees": {"payer": asked.get("fees", {}).get("payer", "account")},
        "is_controller": True,
        "losses": {"payments": asked.get("losses", {}).get("payments", "stripe")},
        "requirement_collection": asked.get("requirement_collection", "stripe"),
        "stripe_dashboard": {"type": asked.get("stripe_dashboard", {}).get("type", "full")},
        "type": "application",
    }
    requested = [name for name, wish in params.get("capabilities", {}).items() if wish.get("requested")]
    schedule = params.get("settings", {}).get("payouts", {}).get("schedule", {})
    return {
        "id": identifier,
        "object": "account",
        "business_profile": {
            "annual_revenue": None,
            "estimated_worker_count": None,
            "mcc": None,
            "minority_owned_business_designation": None,
            "name": params.get("business_profile", {}).get("name"),
            "product_description": params.get("business_profile", {}).get("product_description"),
            "support_address": None,
            "support_email": None,
            "support_phone": None,
            "support_url": None,
            "url": params.get("business_profile", {}).get("url"),
        },
        "business_type": params.get("business_type"),
        "capabilities": dict.fromkeys(requested, "inactive"),
        "charges_enabled": False,
        "controller": controller,
        "country": country,
        "created": now,
        "default_currency": params.get("default_currency", CURRENCIES.get(country, "usd")),
        "details_submitted": False,
        "email": params.get("email"),
        "external_accounts": empty_list(f"/v1/accounts/{identifier}/external_accounts"),
        "future_requirements": requirements([]),
        "metadata": params.get("metadata") or {},
        "payouts_enabled": False,
        "requirements": requirements(ONBOARDING_ASKS),
        "settings": {
            "bacs_debit_payments": {"display_name": None, "service_user_number": None},
            "branding": {"icon": None, "logo": None, "primary_color": None, "secondary_color": None},
            "card_issuing": {"tos_acceptance": {"date": None, "ip": None}},
            "card_payments": {
                "decline_on": {"avs_failure": False, "cvc_failure": False},
                "statement_descriptor_prefix": None,
                "statement_descriptor_prefix_kana": None,
                "statement_descriptor_prefix_kanji": None,
            },
            "dashboard": {"display_name": None, "timezone": "Etc/UTC"},
            "payments": {
                "statement_descriptor": None,
                "statement_descriptor_kana": None,
                "statement_descriptor_kanji": None,
            },
            "payouts": {
                "debit_negative_balances": False,
                "schedule": {"delay_days": 2, "interval": schedule.get("interval", "daily")},
                "statement_descriptor": None,
            },
            "sepa_debit_payments": {},
        },
        "tos_acceptance": {
            "date": None,
            "ip": None,
            "service_agreement": params.get("tos_acceptance", {}).get("service_agreement", "full"),
            "user_agent": None,
        },
        "type": {"express": "express", "none": "none", "full": "standard"}[controller["stripe_dashboard"]["type"]],
    }


ONBOARDING_ASKS = ["external_account", "individual.first_name", "individual.last_name", "tos_acceptance.date"]


def requirements(due: list[str]) -> Body:
    return {
        "alternatives": [],
        "current_deadline": None,
        "currently_due": list(due),
        "disabled_reason": "requirements.past_due" if due else None,
        "errors": [],
        "eventually_due": list(due),
        "past_due": list(due),
        "pending_verification": [],
    }


def bank_account(
    *, account_id: str, holder: str, country: str, currency: str, number: str, routing: str | None
) -> Body:
    return {
        "id": new_id("ba"),
        "object": "bank_account",
        "account": account_id,
        "account_holder_name": holder,
        "account_holder_type": "individual",
        "account_type": None,
        "available_payout_methods": ["standard"],
        "bank_name": "STRIPE TEST BANK",
        "country": country,
        "currency": currency,
        "default_for_currency": True,
        "fingerprint": secrets.token_hex(8),
        "future_requirements": _no_requirements(),
        "last4": number[-4:],  # all that is kept of the number
        "metadata": {},
        "requirements": _no_requirements(),
        "routing_number": routing,
        "status": "new",
    }


def _no_requirements() -> Body:
    return {"currently_due": [], "errors": [], "past_due": [], "pending_verification": []}


def transfer(params: dict[str, Any], *, now: int) -> Body:
    identifier = new_id("tr")
    return {
        "id": identifier,
        "object": "transfer",
        "amount": params["amount"],
        "amount_reversed": 0,
        "balance_transaction": None,
        "created": now,
        "currency": params["currency"],
        "description": params.get("description"),
        "destination": params["destination"],
        "destination_payment": "",  # made beside it
        "livemode": False,
        "metadata": params.get("metadata") or {},
        "reversals": empty_list(f"/v1/transfers/{identifier}/reversals"),
        "reversed": False,
        "source_transaction": None,
        "source_type": "card",
        # Stripe names a group of its own for a transfer without one.
        "transfer_group": params.get("transfer_group") or new_id("group_py"),
    }


def payout(
    *, amount: int, currency: str, now: int, arrival: int, destination: str, automatic: bool, **given: Any
) -> Body:
    return {
        "id": new_id("po"),
        "object": "payout",
        "amount": amount,
        "application_fee": None,
        "application_fee_amount": None,
        "arrival_date": arrival,
        "automatic": automatic,
        "balance_transaction": None,
        "created": now,
        "currency": currency,
        "description": given.get("description") or ("STRIPE PAYOUT" if automatic else None),
        "destination": destination,
        "failure_balance_transaction": None,
        "failure_code": None,
        "failure_message": None,
        "livemode": False,
        "metadata": given.get("metadata") or {},
        "method": "standard",
        "original_payout": None,
        "payout_method": None,
        "reconciliation_status": "completed" if automatic else "not_applicable",
        "reversed_by": None,
        "source_type": "card",
        "statement_descriptor": given.get("statement_descriptor"),
        "status": "pending",
        "trace_id": None,
        "type": "bank_account",
    }


def webhook_endpoint(params: dict[str, Any], *, now: int) -> Body:
    return {
        "id": new_id("we"),
        "object": "webhook_endpoint",
        "api_version": params.get("api_version", schema.API_VERSION),
        "application": None,
        "created": now,
        "description": params.get("description"),
        "enabled_events": params["enabled_events"],
        "livemode": False,
        "metadata": params.get("metadata") or {},
        "status": "enabled",
        "url": params["url"],
        "_connect": params.get("connect", False),
        "_secret": "whsec_" + secrets.token_urlsafe(24),
    }


#: Whom the local Stripe pays, as Stripe's documentation of cross-border payouts names them.
SERVED_COUNTRIES = frozenset(
    [
        "AE",
        "AG",
        "AL",
        "AM",
        "AO",
        "AR",
        "AT",
        "AU",
        "AZ",
        "BA",
        "BD",
        "BE",
        "BG",
        "BH",
        "BJ",
        "BN",
        "BO",
        "BR",
        "BS",
        "BT",
        "BW",
        "CA",
        "CH",
        "CI",
        "CL",
        "CO",
        "CR",
        "CY",
        "CZ",
        "DE",
        "DK",
        "DO",
        "DZ",
        "EC",
        "EE",
        "EG",
        "ES",
        "ET",
        "FI",
        "FR",
        "GA",
        "GB",
        "GH",
        "GM",
        "GR",
        "GT",
        "GY",
        "HK",
        "HR",
        "HU",
        "ID",
        "IE",
        "IL",
        "IN",
        "IS",
        "IT",
        "JM",
        "JO",
        "JP",
        "KE",
        "KH",
        "KR",
        "KW",
        "KZ",
        "LA",
        "LC",
        "LI",
        "LK",
        "LT",
        "LU",
        "LV",
        "MA",
        "MC",
        "MD",
        "MG",
        "MK",
        "MN",
        "MO",
        "MT",
        "MU",
        "MX",
        "MY",
        "MZ",
        "NA",
        "NE",
        "NG",
        "NL",
        "NO",
        "NZ",
        "OM",
        "PA",
        "PE",
        "PH",
        "PK",
        "PL",
        "PT",
        "PY",
        "QA",
        "RO",
        "RS",
        "RW",
        "SA",
        "SE",
        "SG",
        "SI",
        "SK",
        "SM",
        "SN",
        "SV",
        "TH",
        "TN",
        "TR",
        "TT",
        "TW",
        "TZ",
        "US",
        "UY",
        "UZ",
        "VN",
        "ZA",
    ]
)


def country_spec(country: str) -> Body:
    """What Stripe offers in a country; only where it transfers to is played."""
    return {
        "id": country,
        "object": "country_spec",
        "default_currency": CURRENCIES.get(country, "usd"),
        "supported_bank_account_currencies": {CURRENCIES.get(country, "usd"): [country]},
        "supported_payment_currencies": sorted({"usd", "eur", "gbp", "jpy"}),
        "supported_payment_methods": ["card"],
        "supported_transfer_countries": sorted(SERVED_COUNTRIES),
        "verification_fields": {
            "company": {"additional": [], "minimum": []},
            "individual": {"additional": [], "minimum": []},
        },
    }
