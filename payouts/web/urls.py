from django.urls import path

from payouts.web import views

urlpatterns = [
    path("webhooks/stripe/platform/", views.platform_webhook, name="stripe-platform-webhook"),
    path("webhooks/stripe/connect/", views.connect_webhook, name="stripe-connect-webhook"),
]
