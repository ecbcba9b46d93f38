// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cohort-project/cohort/snapshotter/capture"
	"github.com/cohort-project/cohort/snapshotter/volume"
)

// collectTimeout bounds what a scrape waits for the metastore.
const collectTimeout = 5 * time.Second

// Counter counts snapshots by kind.
type Counter interface {
	Count(ctx context.Context) (map[snapshots.Kind]int, error)
}

// Metrics are cohortd's numbers. It is a prometheus.Collector; counts are made when
// they are asked for. A nil Metrics measures nothing.
type Metrics struct {
	takes    prometheus.Histogram
	failures prometheus.Counter

	root      string
	captures  *capture.Store
	snapshots Counter
}

var (
	descBackend   = prometheus.NewDesc("cohort_storage_backend_info", "Always 1; the backend in use is the label.", []string{"backend"}, nil)
	descCaptures  = prometheus.NewDesc("cohort_storage_captures", "Captures by state.", []string{"state"}, nil)
	descSnapshots = prometheus.NewDesc("cohort_storage_snapshots", "Snapshots by kind.", []string{"kind"}, nil)
	descFree      = prometheus.NewDesc("cohort_storage_free_bytes", "Free bytes of the root's file system.", nil, nil)
	descSize      = prometheus.NewDesc("cohort_storage_size_bytes", "Size of the root's file system.", nil, nil)
)

// NewMetrics returns the metrics of one root.
func NewMetrics(root string, captures *capture.Store, counter Counter) *Metrics {
	return &Metrics{
		root: root, captures: captures, snapshots: counter,
		takes: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "cohort_storage_take_seconds",
			Help:    "Time that a capture took while its containers were frozen.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14), // 1 ms to 8 s
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cohort_storage_take_failures_total", Help: "Captures that failed while their containers were frozen.",
		}),
	}
}

func (m *Metrics) took(d time.Duration, err error) {
	switch {
	case m == nil:
	case err != nil:
		m.failures.Inc()
	default:
		m.takes.Observe(d.Seconds())
	}
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	m.takes.Describe(ch)
	m.failures.Describe(ch)
	for _, d := range []*prometheus.Desc{descBackend, descCaptures, descSnapshots, descFree, descSize} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.takes.Collect(ch)
	m.failures.Collect(ch)
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(descBackend, 1, m.captures.Backend().Name())
	states := map[capture.State]int{capture.Open: 0, capture.Taken: 0, capture.Sealed: 0}
	for _, i := range m.captures.List() {
		states[i.State]++
	}
	for s, n := range states {
		gauge(descCaptures, float64(n), string(s))
	}
	ctx, cancel := context.WithTimeout(context.Background(), collectTimeout)
	defer cancel()
	if kinds, err := m.snapshots.Count(ctx); err != nil {
		ch <- prometheus.NewInvalidMetric(descSnapshots, err)
	} else {
		for k, n := range kinds {
			gauge(descSnapshots, float64(n), k.String())
		}
	}
	free, size, err := volume.Free(m.root)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descFree, err)
		return
	}
	gauge(descFree, float64(free))
	gauge(descSize, float64(size))
}
