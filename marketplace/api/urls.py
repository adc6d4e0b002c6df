from marketplace.api.views import DatasetViewSet, LicenseViewSet, OrderViewSet

routes = [
    ("datasets", DatasetViewSet, "dataset"),
    ("orders", OrderViewSet, "order"),
    ("licenses", LicenseViewSet, "license"),
]
paths: list = []
