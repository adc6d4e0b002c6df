from marketplace.api.views import ContributorViewSet, DatasetViewSet, LicenseViewSet, OrderViewSet

routes = [
    ("datasets", DatasetViewSet, "dataset"),
    ("contributors", ContributorViewSet, "contributor"),
    ("orders", OrderViewSet, "order"),
    ("licenses", LicenseViewSet, "license"),
]
paths: list = []
