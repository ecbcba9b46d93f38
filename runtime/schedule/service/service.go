// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"

	api "github.com/cohort-project/cohort/api/schedule/v1"
	"github.com/cohort-project/cohort/runtime/schedule"
)

// Schedules implements the Schedules service over a keeper.
type Schedules struct {
	keeper *schedule.Keeper
}

var _ api.SchedulesService = (*Schedules)(nil)

// New returns the service.
func New(k *schedule.Keeper) *Schedules { return &Schedules{k} }

// Set implements api.SchedulesService.
func (s *Schedules) Set(ctx context.Context, r *api.SetRequest) (*api.Schedule, error) {
	st, err := s.keeper.Set(ctx, schedule.Spec{
		Namespace: r.GetNamespace(), Address: r.GetAddress(), Group: r.GetGroup(), Ref: r.GetRef(),
		Every: time.Duration(r.GetEveryNs()), Keep: int(r.GetKeep()),
	})
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return message(st), nil
}

// Remove implements api.SchedulesService.
func (s *Schedules) Remove(ctx context.Context, r *api.RemoveRequest) (*api.Empty, error) {
	err := s.keeper.Remove(ctx, schedule.Key{Namespace: r.GetNamespace(), Group: r.GetGroup()})
	return &api.Empty{}, errgrpc.ToGRPC(err)
}

// List implements api.SchedulesService.
func (s *Schedules) List(_ context.Context, r *api.ListRequest) (*api.ListResponse, error) {
	out := &api.ListResponse{}
	for _, st := range s.keeper.List(r.GetNamespace()) {
		out.Schedules = append(out.Schedules, message(st))
	}
	return out, nil
}

func message(st schedule.Status) *api.Schedule {
	m := &api.Schedule{
		Namespace: st.Namespace, Address: st.Address, Group: st.Group, Ref: st.Ref,
		EveryNs: int64(st.Every), Keep: uint32(st.Keep), CreatedUnixNs: unix(st.Created),
		Running: st.Running, NextUnixNs: unix(st.Next),
		Passes: st.Passes, Failed: st.Failed, Failures: uint32(st.Failures), Error: st.Error, ErrorUnixNs: unix(st.ErrorAt),
	}
	if l := st.Last; l != nil {
		m.Last = &api.Epoch{Id: l.ID, Number: l.Number, Ref: l.Ref, AtUnixNs: unix(l.At), StopMs: l.StopMS}
	}
	return m
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}
