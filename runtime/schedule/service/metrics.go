// SPDX-License-Identifier: Apache-2.0

package service

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cohort-project/cohort/runtime/schedule"
)

// Metrics are the numbers of a keeper's schedules, read when they are asked for. It
// is a prometheus.Collector.
type Metrics struct {
	keeper *schedule.Keeper
}

var (
	labels     = []string{"namespace", "group"}
	descPasses = prometheus.NewDesc("cohort_schedule_passes_total", "Passes of a schedule since it was set, by result.", []string{"namespace", "group", "result"}, nil)
	descFailed = prometheus.NewDesc("cohort_schedule_failures", "Failures in a row of a schedule's passes.", labels, nil)
	descStop   = prometheus.NewDesc("cohort_schedule_last_stop_seconds", "How long the members of the group stood still for the newest epoch of a schedule.", labels, nil)
	descTime   = prometheus.NewDesc("cohort_schedule_last_success_timestamp_seconds", "Unix time of the newest epoch of a schedule.", labels, nil)
)

// NewMetrics returns the metrics of a keeper.
func NewMetrics(k *schedule.Keeper) *Metrics { return &Metrics{k} }

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descPasses, descFailed, descStop, descTime} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	for _, s := range m.keeper.List("") {
		send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, more ...string) {
			ch <- prometheus.MustNewConstMetric(d, kind, v, append([]string{s.Namespace, s.Group}, more...)...)
		}
		send(descPasses, prometheus.CounterValue, float64(s.Passes), "done")
		send(descPasses, prometheus.CounterValue, float64(s.Failed), "failed")
		send(descFailed, prometheus.GaugeValue, float64(s.Failures))
		if s.Last != nil {
			send(descStop, prometheus.GaugeValue, s.Last.StopMS/1e3)
			send(descTime, prometheus.GaugeValue, float64(s.Last.At.UnixNano())/1e9)
		}
	}
}
